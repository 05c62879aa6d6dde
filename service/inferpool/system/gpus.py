"""Where models may run: the names of devices, the GPUs that this process sees, and which a model is put on.

GPUs are asked for at NVIDIA's driver itself (`libcuda`), by the numbers that CUDA gives them: so
`CUDA_VISIBLE_DEVICES` and MIG devices mean here what they mean to the runtimes. Nothing is asked before a
model may need a GPU, and asking makes no CUDA context.
"""

from __future__ import annotations

import ctypes
import os
import re
import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from inferpool.errors import LoadError

AUTO: Final = "auto"
CPU: Final = "cpu"
_GPU: Final = re.compile(r"cuda:(0|[1-9]\d{0,2})")


class Gpu(NamedTuple):
    """A GPU, or a MIG device of one.

    Attributes:
        number: the N of `cuda:N`.
        name: what its maker calls it.
        uuid: as NVML and nvidia-smi write it, without `GPU-` or `MIG-` before it.
        memory_bytes: what it has in all.
    """

    number: int
    name: str
    uuid: str
    memory_bytes: int

    @property
    def device(self) -> str:
        """The device's name: `cuda:0`."""
        return f"cuda:{self.number}"


class Driver(Protocol):
    """What is asked of the GPUs' driver."""

    def fault(self) -> str:
        """Why no GPU can be used, in a sentence; "" if one can."""

    def cuda(self) -> tuple[int, int]:
        """The newest CUDA that the driver serves, as `(13, 0)`; it has no `fault`."""

    def gpus(self) -> Sequence[Gpu]:
        """The GPUs that this process may use, in CUDA's order; none where there is a `fault`."""


def check_devices(devices: Sequence[str]) -> None:
    """Raise ValueError unless these are names of devices, and can stand together."""
    for device in devices:
        if device not in (AUTO, CPU) and not _GPU.fullmatch(device):
            raise ValueError(f'"{device}" is no device; there are "auto", "cpu", "cuda:0", "cuda:1", …')
    if not devices:
        raise ValueError('at least one device is needed: "auto", "cpu" or "cuda:0"')
    if len(devices) > 1 and (AUTO in devices or CPU in devices):
        raise ValueError('"auto" and "cpu" stand alone')
    if len(set(devices)) < len(devices):
        raise ValueError("a device stands there twice")


def gpu_index(device: str) -> int:
    """The N of `cuda:N`."""
    return int(device.removeprefix("cuda:"))


def place(wanted: Sequence[str], driver: Driver, lacks: Callable[[], str]) -> tuple[str, ...]:
    """The devices that a model's instances are put on.

    `wanted` has passed `check_devices`; `lacks()` says why the model's backend can use no GPU, "" if it can.
    `auto` is every GPU there is if one can be used, else the CPU. A GPU that was named is taken, or it is an
    error: raises LoadError, which says what is missing.
    """
    if tuple(wanted) == (CPU,):
        return (CPU,)
    if tuple(wanted) == (AUTO,):
        there = tuple(gpu.device for gpu in driver.gpus())
        return there if there and not lacks() else (CPU,)
    asked = ", ".join(wanted)
    if reason := lacks():
        raise LoadError(f"it is to run on {asked}, but {reason}")
    if fault := driver.fault():
        raise LoadError(f"it is to run on {asked}, but {fault}")
    there = tuple(gpu.device for gpu in driver.gpus())
    for device in wanted:
        if device not in there:
            raise LoadError(f"there is no {device}: this process sees {', '.join(there)}{_visible()}")
    return tuple(wanted)


def check_cuda(driver: Driver, needed: str, runtime: str) -> None:
    """Raise LoadError unless `driver` serves CUDA `needed` (`13.0`), for which `runtime` is built.

    A driver serves every version of CUDA that has its own major number, or an older one ("CUDA
    Compatibility", docs.nvidia.com).
    """
    if fault := driver.fault():
        raise LoadError(fault)
    cuda = int(needed.partition(".")[0])
    major, minor = driver.cuda()
    if major < cuda:
        raise LoadError(
            f"NVIDIA's driver serves CUDA up to {major}.{minor}, and {runtime} is built for CUDA {needed}:"
            f" it needs driver {_DRIVERS.get(cuda, 'of that version')} or later"
        )


@lru_cache(maxsize=1)
def cuda_driver() -> Driver:
    """NVIDIA's driver on this machine; it is asked once."""
    return _CudaDriver()


_DRIVERS: Final = {12: "525", 13: "580"}
"""The first driver of each CUDA, from the release notes of CUDA's toolkit."""

# From cuda.h.
_SUCCESS: Final = 0
_NO_DEVICE: Final = 100


class _CudaDriver:
    """The driver by its own library. Raises nothing: what is wrong is its `fault`."""

    def __init__(self) -> None:
        self._gpus: list[Gpu] = []
        self._cuda = (0, 0)
        self._fault = ""
        self._asked = False

    def fault(self) -> str:
        self._ask()
        return self._fault

    def cuda(self) -> tuple[int, int]:
        self._ask()
        return self._cuda

    def gpus(self) -> Sequence[Gpu]:
        self._ask()
        return self._gpus

    def _ask(self) -> None:
        """Ask the driver, the first time."""
        if self._asked:
            return
        self._asked = True
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            self._fault = f"no NVIDIA driver is to be found ({error}); a container needs --gpus as well"
            return
        status = self._library.cuInit(0)
        if status == _NO_DEVICE:
            self._fault = f"NVIDIA's driver shows this process no GPU{_visible()}"
        elif status != _SUCCESS:
            self._fault = f"NVIDIA's driver cannot be used: {self._text(status)}"
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
            # The first version gives the whole card's for a MIG device.
            self._library.cuDeviceGetUuid_v2(ctypes.byref(identity), device)
            self._library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
            identifier = str(uuid.UUID(bytes=bytes(identity)))
            self._gpus.append(Gpu(index, name.value.decode(errors="replace"), identifier, memory.value))

    def _text(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode(errors='replace')} (CUDA error {status})"


def _visible() -> str:
    """What the environment says of the GPUs to be seen, for the end of a sentence."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f"; CUDA_VISIBLE_DEVICES is {value!r}"
