"""A stand-in for the memory of a GPU."""

from __future__ import annotations

import ctypes

import numpy as np
from inferpool.backends.cuda.memory import Memory
from inferpool.errors import Reason
from inferpool.tensors import Array


class HostMemory(Memory):
    """Memory of the host in the place of a device: copies are made at once."""

    def __init__(self) -> None:
        self._kept: list[Array] = []
        self.fault: Reason | None = None

    def enter(self) -> None:
        """Do nothing: every thread may use the memory."""

    def end_capture(self) -> None:
        """Do nothing: there is no stream."""

    def host(self, nbytes: int) -> Array:
        """Allocate plain memory."""
        self._kept.append(np.empty(nbytes, np.uint8))
        return self._kept[-1]

    def device(self, nbytes: int) -> int:
        """Allocate plain memory and return its address."""
        return int(self.host(nbytes).ctypes.data)

    def upload(self, address: int, host: Array) -> None:
        """Copy."""
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, host: Array, address: int) -> None:
        """Copy."""
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        """Set the bytes to zero."""
        ctypes.memset(address, 0, nbytes)

    def wait(self) -> None:
        """Do nothing: every copy has been made."""

    def lost(self) -> Reason | None:
        """Return what a test has set."""
        return self.fault

    def close(self) -> None:
        """Free the memory."""
        self._kept.clear()
