"""Device names, the GPUs that this process sees, and the choice of devices for a model.

The GPUs are read from NVIDIA's driver (`libcuda`) in CUDA's numbering, so `CUDA_VISIBLE_DEVICES` and MIG
devices mean the same here as to the runtimes. The driver is queried when a model may first need a GPU. The
query creates no CUDA context.
"""

from __future__ import annotations

import ctypes
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from inferpool.errors import LoadError, Reason

AUTO: Final = "auto"
CPU: Final = "cpu"
_GPU: Final = re.compile(r"cuda:(0|[1-9]\d{0,2})")


class Gpu(NamedTuple):
    """A GPU, or a MIG device of a GPU.

    Attributes:
        number: the N of `cuda:N`.
        name: the product name, as the driver reports it.
        uuid: the UUID that NVML and nvidia-smi show, without the prefix `GPU-` or `MIG-`.
        memory_bytes: the total memory.
    """

    number: int
    name: str
    uuid: str
    memory_bytes: int

    @property
    def device(self) -> str:
        """The device name: `cuda:0`."""
        return f"cuda:{self.number}"


class Driver(Protocol):
    """The queries that the server makes to the GPU driver."""

    def unavailable_reason(self) -> Reason | None:
        """Why no GPU can be used; None if a GPU can be used."""

    def cuda(self) -> tuple[int, int]:
        """The newest CUDA version that the driver supports, as `(13, 0)`. Requires an available GPU."""

    def gpus(self) -> Sequence[Gpu]:
        """The GPUs that this process may use, in CUDA's order; empty if no GPU can be used."""


@contextmanager
def gpu_support() -> Iterator[None]:
    """Wrap the import of a module from a folder named `gpu`.

    Raises LoadError if the folder is missing. An installation for CPUs may leave all of these folders out.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if "gpu" in (error.name or "").split("."):
            raise LoadError("GPU support is not part of this installation") from error
        raise


def check_devices(devices: Sequence[str]) -> None:
    """Raise ValueError unless `devices` are device names that can be combined."""
    for device in devices:
        if device not in (AUTO, CPU) and not _GPU.fullmatch(device):
            raise ValueError(f'"{device}" is no device; expected "auto", "cpu", "cuda:0", "cuda:1", …')
    if not devices:
        raise ValueError('no device is given; expected "auto", "cpu" or "cuda:0"')
    if len(devices) > 1 and (AUTO in devices or CPU in devices):
        raise ValueError('"auto" and "cpu" cannot be combined with other devices')
    if len(set(devices)) < len(devices):
        raise ValueError("a device is given twice")


def gpu_index(device: str) -> int:
    """The N of `cuda:N`."""
    return int(device.removeprefix("cuda:"))


def choose_devices(
    wanted: Sequence[str], driver: Driver, backend_reason: Callable[[], Reason | None]
) -> tuple[str, ...]:
    """The devices for a model's instances.

    `wanted` has passed `check_devices`. `backend_reason()` says why the model's backend can use no GPU, or
    None. `auto` means all GPUs if one can be used, else the CPU. A GPU that `wanted` names is used or
    reported: raises LoadError with what is missing.
    """
    if tuple(wanted) == (CPU,):
        return (CPU,)
    if tuple(wanted) == (AUTO,):
        available = tuple(gpu.device for gpu in driver.gpus())
        return available if available and not backend_reason() else (CPU,)
    asked = ", ".join(wanted)
    if reason := backend_reason() or driver.unavailable_reason():
        raise LoadError(f"the model is configured for {asked}, but {reason}")
    available = tuple(gpu.device for gpu in driver.gpus())
    for device in wanted:
        if device not in available:
            raise LoadError(f"there is no {device}: this process sees {', '.join(available)}{_visible()}")
    return tuple(wanted)


def check_cuda(driver: Driver, needed: str, runtime: str) -> None:
    """Raise LoadError unless `driver` supports CUDA `needed` (`13.0`), which `runtime` was built for.

    A driver supports every CUDA version up to its own major version ("CUDA Compatibility", docs.nvidia.com).
    """
    if reason := driver.unavailable_reason():
        raise LoadError(reason)
    cuda = int(needed.partition(".")[0])
    major, minor = driver.cuda()
    if major < cuda:
        raise LoadError(
            f"NVIDIA's driver supports CUDA up to {major}.{minor}, but {runtime} is built for CUDA {needed}:"
            f" install driver {_DRIVERS.get(cuda, 'for that version')} or later"
        )


@lru_cache(maxsize=1)
def cuda_driver() -> Driver:
    """NVIDIA's driver on this machine. The driver is queried once."""
    return _CudaDriver()


_DRIVERS: Final = {12: "525", 13: "580"}
"""The first driver for each major CUDA version, from the release notes of the CUDA toolkit."""

# From cuda.h.
_SUCCESS: Final = 0
_NO_DEVICE: Final = 100


class _CudaDriver:
    """The driver, called through its library. Errors become the `unavailable_reason`."""

    def __init__(self) -> None:
        self._gpus: list[Gpu] = []
        self._cuda = (0, 0)
        self._reason: Reason | None = None
        self._queried = False

    def unavailable_reason(self) -> Reason | None:
        self._query()
        return self._reason

    def cuda(self) -> tuple[int, int]:
        self._query()
        return self._cuda

    def gpus(self) -> Sequence[Gpu]:
        self._query()
        return self._gpus

    def _query(self) -> None:
        """Query the driver on the first call."""
        if self._queried:
            return
        self._queried = True
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            self._reason = f"no NVIDIA driver was found ({error}); a container also needs --gpus"
            return
        status = self._library.cuInit(0)
        if status == _NO_DEVICE:
            self._reason = f"NVIDIA's driver shows this process no GPU{_visible()}"
        elif status != _SUCCESS:
            self._reason = f"NVIDIA's driver cannot be used: {self._text(status)}"
        else:
            version = ctypes.c_int()
            self._library.cuDriverGetVersion(ctypes.byref(version))
            self._cuda = (version.value // 1000, version.value % 1000 // 10)
            self._read()

    def _read(self) -> None:
        count = ctypes.c_int()
        self._library.cuDeviceGetCount(ctypes.byref(count))
        for index in range(count.value):
            device, memory = ctypes.c_int(), ctypes.c_size_t()
            name, identity = ctypes.create_string_buffer(128), (ctypes.c_ubyte * 16)()
            self._library.cuDeviceGet(ctypes.byref(device), index)
            self._library.cuDeviceGetName(name, len(name), device)
            # For a MIG device, version 1 of this call returns the UUID of the whole card.
            self._library.cuDeviceGetUuid_v2(ctypes.byref(identity), device)
            self._library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
            identifier = str(uuid.UUID(bytes=bytes(identity)))
            self._gpus.append(Gpu(index, name.value.decode(errors="replace"), identifier, memory.value))

    def _text(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode(errors='replace')} (CUDA error {status})"


def _visible() -> str:
    """The value of CUDA_VISIBLE_DEVICES as the end of a sentence; empty if it is unset."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f"; CUDA_VISIBLE_DEVICES is {value!r}"
