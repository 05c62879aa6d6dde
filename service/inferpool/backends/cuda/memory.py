"""Memory of a GPU, and the copies to and from it, by CUDA's runtime library; nothing here knows a model.

ONNX Runtime's Python interface has no page-locked memory and no copy that does not block. Both are needed
for copies that overlap with another instance's run; the library is the one that ONNX Runtime has loaded.
Functions and numbers are those of cuda_runtime_api.h and driver_types.h.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferpool.errors import LoadError, OutOfMemory
from inferpool.tensors import Array

_PORTABLE: Final = 1
_NON_BLOCKING: Final = 1
_TO_DEVICE: Final = 1
_TO_HOST: Final = 2
_OUT_OF_MEMORY: Final = 2
_THREAD_LOCAL: Final = 1

ALONE: Final = threading.Lock()
"""Held while a graph is captured, and while a session is opened: that waits for the whole device, which a
capture does not outlive, whoever waits."""


def load_library(name: str) -> ctypes.CDLL:
    """A library by its name, or else out of one of NVIDIA's wheels; raises OSError."""
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        for wheel, place in (("nvidia", "*/lib"), ("tensorrt_libs", ".")):
            spec = importlib.util.find_spec(wheel)
            for folder in spec.submodule_search_locations or () if spec is not None else ():
                for file in Path(folder).glob(f"{place}/{name}"):
                    return ctypes.CDLL(str(file))
        raise error


class Memory(ABC):
    """Where the inputs and outputs of one instance lie: on the device, and on its way there and back.

    Attributes:
        stream: the handle of the stream that copies are queued in; 0 where they are made at once.
    """

    stream: int = 0

    @abstractmethod
    def enter(self) -> None:
        """Make the calling thread fit to use this, and the device; it costs nothing but the first time."""

    @abstractmethod
    def end_capture(self) -> None:
        """End a capture of the stream that a run which failed has left open, on the thread that ran."""

    @abstractmethod
    def host(self, nbytes: int) -> Array:
        """`nbytes` bytes (uint8) from which copies are quick; raises OutOfMemory."""

    @abstractmethod
    def device(self, nbytes: int) -> int:
        """The address of `nbytes` bytes on the device; raises OutOfMemory."""

    @abstractmethod
    def upload(self, address: int, host: Array) -> None:
        """Begin to copy contiguous `host` to the device; it must not change before `wait`."""

    @abstractmethod
    def download(self, host: Array, address: int) -> None:
        """Begin to copy from the device to contiguous `host`, which is there after `wait`."""

    @abstractmethod
    def clear(self, address: int, nbytes: int) -> None:
        """Begin to set `nbytes` bytes on the device to zero, after what was queued before."""

    @abstractmethod
    def wait(self) -> None:
        """Block until every copy has been made."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; no copy is under way."""


class HostMemory(Memory):
    """The CPU as a device: addresses are those of arrays, and copies are made at once."""

    def __init__(self) -> None:
        self._kept: list[Array] = []

    def enter(self) -> None:
        """Every thread is fit."""

    def end_capture(self) -> None:
        """There is no stream."""

    def host(self, nbytes: int) -> Array:
        """Plain memory."""
        self._kept.append(np.empty(nbytes, np.uint8))
        return self._kept[-1]

    def device(self, nbytes: int) -> int:
        """Plain memory too."""
        return int(self.host(nbytes).ctypes.data)

    def upload(self, address: int, host: Array) -> None:
        """Copy."""
        ctypes.memmove(address, host.ctypes.data, host.nbytes)

    def download(self, host: Array, address: int) -> None:
        """Copy."""
        ctypes.memmove(host.ctypes.data, address, host.nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        """Set them to zero."""
        ctypes.memset(address, 0, nbytes)

    def wait(self) -> None:
        """Every copy has been made."""

    def close(self) -> None:
        """Let go of the memory."""
        self._kept.clear()


class CudaMemory(Memory):
    """A GPU's own memory and page-locked memory, with a stream for the copies."""

    def __init__(self, index: int, cuda: int) -> None:
        """For device `cuda:index`, by the runtime of CUDA `cuda`, a major version; raises LoadError."""
        try:
            self._library: Any = ctypes.CDLL(f"libcudart.so.{cuda}")
        except OSError as error:
            raise LoadError(f"CUDA's runtime library cannot be loaded: {error}") from error
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._index = index
        self._given_back: list[Callable[[], Any]] = []
        self._stream = ctypes.c_void_p()
        self._entered = threading.local()
        self.enter()
        self._check(self._library.cudaStreamCreateWithFlags(ctypes.byref(self._stream), _NON_BLOCKING))
        self.stream = self._stream.value or 0

    def enter(self) -> None:
        """Choose the device, and let no capture of another thread forbid this one to allocate.

        ONNX Runtime captures in CUDA's global mode. As long as that lasts, a thread in the mode that threads
        begin in can allocate nothing, and breaks the capture when it tries.
        """
        if not hasattr(self._entered, "done"):
            self._use()

    def end_capture(self) -> None:
        """End it, and drop what was captured: a session that is closed while one is open ends the process."""
        status, graph = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._library.cudaStreamIsCapturing(self._stream, ctypes.byref(status)))
        if status.value:
            # It says that the capture was invalid, which is known.
            self._library.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
            if graph.value:
                self._library.cudaGraphDestroy(graph)
            self._library.cudaGetLastError()

    def host(self, nbytes: int) -> Array:
        """Page-locked memory, which every device may copy from."""
        self._use()
        address = ctypes.c_void_p()
        self._check(self._library.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes), _PORTABLE))
        self._given_back.append(lambda: self._library.cudaFreeHost(address))
        return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address.value or 0))

    def device(self, nbytes: int) -> int:
        """Memory of the GPU."""
        self._use()
        address = ctypes.c_void_p()
        self._check(self._library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(nbytes)))
        self._given_back.append(lambda: self._library.cudaFree(address))
        return address.value or 0

    def upload(self, address: int, host: Array) -> None:
        """Begin to copy to the GPU."""
        self._copy(address, host.ctypes.data, host.nbytes, _TO_DEVICE)

    def download(self, host: Array, address: int) -> None:
        """Begin to copy from the GPU."""
        self._copy(host.ctypes.data, address, host.nbytes, _TO_HOST)

    def clear(self, address: int, nbytes: int) -> None:
        """Begin to set memory of the GPU to zero."""
        self._check(
            self._library.cudaMemsetAsync(ctypes.c_void_p(address), 0, ctypes.c_size_t(nbytes), self._stream)
        )

    def wait(self) -> None:
        """Block, without the interpreter lock, until the stream is empty."""
        self._check(self._library.cudaStreamSynchronize(self._stream))

    def close(self) -> None:
        """Free what was allocated, and the stream."""
        self._use()
        for give_back in self._given_back:
            give_back()
        self._given_back.clear()
        self._library.cudaStreamDestroy(self._stream)

    def _use(self) -> None:
        # The current device is the thread's: each call that makes something says which it means.
        self._check(self._library.cudaSetDevice(self._index))
        if not hasattr(self._entered, "done"):
            mode = ctypes.c_int(_THREAD_LOCAL)
            self._check(self._library.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
            self._entered.done = True

    def _copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        self._check(
            self._library.cudaMemcpyAsync(
                ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), kind, self._stream
            )
        )

    def _check(self, status: int) -> None:
        if not status:
            return
        text = self._library.cudaGetErrorString(status).decode(errors="replace")
        # An error is kept for whoever asks next, which would be ONNX Runtime; clear it.
        self._library.cudaGetLastError()
        if status == _OUT_OF_MEMORY:
            raise OutOfMemory(f"CUDA: {text}")
        raise RuntimeError(f"CUDA: {text} (error {status})")
