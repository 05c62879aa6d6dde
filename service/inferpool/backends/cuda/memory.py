"""GPU memory, and the copies to and from it, through CUDA's runtime library. Knows no model.

ONNX Runtime's Python interface has neither page-locked memory nor copies that do not block. Both are needed
for copies that overlap with the run of another instance. ONNX Runtime loads the same library. Functions and
numbers are those of cuda_runtime_api.h and driver_types.h.
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

from inferpool.errors import LoadError, OutOfMemory, Reason
from inferpool.tensors import Array

_PORTABLE: Final = 1
_NON_BLOCKING: Final = 1
_TO_DEVICE: Final = 1
_TO_HOST: Final = 2
_OUT_OF_MEMORY: Final = 2
_THREAD_LOCAL: Final = 1


def load_library(name: str) -> ctypes.CDLL:
    """Load a library by its name, or from one of NVIDIA's wheels; raises OSError."""
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        for wheel, pattern in (("nvidia", "*/lib"), ("tensorrt_libs", ".")):
            spec = importlib.util.find_spec(wheel)
            for folder in spec.submodule_search_locations or () if spec is not None else ():
                for file in Path(folder).glob(f"{pattern}/{name}"):
                    return ctypes.CDLL(str(file))
        raise error


class Memory(ABC):
    """The memory of one instance's inputs and outputs, on the device and on the host.

    Attributes:
        stream: the handle of the stream in which copies are queued; 0 if copies are made at once.
    """

    stream: int = 0

    @abstractmethod
    def enter(self) -> None:
        """Prepare the calling thread to use the device. Only a thread's first call has a cost."""

    @abstractmethod
    def end_capture(self) -> None:
        """End a capture that a failed run left open in the stream. The thread of that run must call this."""

    @abstractmethod
    def host(self, nbytes: int) -> Array:
        """Allocate `nbytes` bytes (uint8) on the host that copy quickly; raises OutOfMemory."""

    @abstractmethod
    def device(self, nbytes: int) -> int:
        """Allocate `nbytes` bytes on the device and return their address; raises OutOfMemory."""

    @abstractmethod
    def upload(self, address: int, host: Array) -> None:
        """Start to copy `host`, a contiguous array, to the device. `host` must not change before `wait`."""

    @abstractmethod
    def download(self, host: Array, address: int) -> None:
        """Start to copy from the device to `host`, a contiguous array, which is complete after `wait`."""

    @abstractmethod
    def clear(self, address: int, nbytes: int) -> None:
        """Start to set `nbytes` bytes on the device to zero, after all work queued before."""

    @abstractmethod
    def wait(self) -> None:
        """Block until all queued work is done."""

    @abstractmethod
    def lost(self) -> Reason | None:
        """Why this process cannot use the device any more; None if it can."""

    @abstractmethod
    def close(self) -> None:
        """Free all memory. No copy is in progress."""


class CudaMemory(Memory):
    """GPU memory and page-locked host memory, with a stream for the copies."""

    def __init__(self, index: int, cuda: int) -> None:
        """For device `cuda:index`, with the runtime library of CUDA major version `cuda`.

        Raises LoadError if the library cannot be loaded.
        """
        try:
            self._library: Any = ctypes.CDLL(f"libcudart.so.{cuda}")
        except OSError as error:
            raise LoadError(f"CUDA's runtime library cannot be loaded: {error}") from error
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._index = index
        self._frees: list[Callable[[], Any]] = []
        self._stream = ctypes.c_void_p()
        self._entered = threading.local()
        self.enter()
        self._check(self._library.cudaStreamCreateWithFlags(ctypes.byref(self._stream), _NON_BLOCKING))
        self.stream = self._stream.value or 0

    def enter(self) -> None:
        """Select the device, and let this thread allocate while another thread captures.

        ONNX Runtime captures in CUDA's global mode. During such a capture, a thread in the default mode
        cannot allocate, and an attempt breaks the capture.
        """
        if not hasattr(self._entered, "done"):
            self._use()

    def end_capture(self) -> None:
        """End the capture and drop its graph. Closing a session during a capture would end the process."""
        status, graph = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._library.cudaStreamIsCapturing(self._stream, ctypes.byref(status)))
        if status.value:
            # The call reports that the capture is invalid, which is expected.
            self._library.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
            if graph.value:
                self._library.cudaGraphDestroy(graph)
            self._library.cudaGetLastError()

    def host(self, nbytes: int) -> Array:
        """Allocate page-locked memory that every device may copy from."""
        self._use()
        address = ctypes.c_void_p()
        self._check(self._library.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes), _PORTABLE))
        self._frees.append(lambda: self._library.cudaFreeHost(address))
        return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address.value or 0))

    def device(self, nbytes: int) -> int:
        """Allocate memory on the GPU."""
        self._use()
        address = ctypes.c_void_p()
        self._check(self._library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(nbytes)))
        self._frees.append(lambda: self._library.cudaFree(address))
        return address.value or 0

    def upload(self, address: int, host: Array) -> None:
        """Start to copy to the GPU."""
        self._copy(address, host.ctypes.data, host.nbytes, _TO_DEVICE)

    def download(self, host: Array, address: int) -> None:
        """Start to copy from the GPU."""
        self._copy(host.ctypes.data, address, host.nbytes, _TO_HOST)

    def clear(self, address: int, nbytes: int) -> None:
        """Start to set GPU memory to zero."""
        self._check(
            self._library.cudaMemsetAsync(ctypes.c_void_p(address), 0, ctypes.c_size_t(nbytes), self._stream)
        )

    def wait(self) -> None:
        """Block, without the interpreter lock, until the stream is empty."""
        self._check(self._library.cudaStreamSynchronize(self._stream))

    def lost(self) -> Reason | None:
        """Ask twice: the first answer may be the error of an earlier call, which a good context forgets."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        for _ in range(2):
            # Unlike a synchronisation of the device, these calls leave the captures of other threads intact.
            status = self._library.cudaStreamSynchronize(self._stream)
            status = status or self._library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
            if not status:
                return None
            self._library.cudaGetLastError()
        return f"CUDA: {self._error_text(status)}"

    def close(self) -> None:
        """Free all memory and the stream."""
        self._use()
        for free in self._frees:
            free()
        self._frees.clear()
        self._library.cudaStreamDestroy(self._stream)

    def _use(self) -> None:
        # CUDA keeps the current device by thread, so every call that allocates selects the device first.
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
        text = self._error_text(status)
        # CUDA keeps the last error for the next caller, which would be ONNX Runtime. Clear the error.
        self._library.cudaGetLastError()
        if status == _OUT_OF_MEMORY:
            raise OutOfMemory(f"CUDA: {text}")
        raise RuntimeError(f"CUDA: {text}")

    def _error_text(self, status: int) -> str:
        return f"{self._library.cudaGetErrorString(status).decode(errors='replace')} (error {status})"
