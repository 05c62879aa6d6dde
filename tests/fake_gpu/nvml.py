"""A fake of the module `pynvml` for two GPUs and a MIG device. A missing reading raises NVMLError."""

from __future__ import annotations

from typing import NamedTuple


class NVMLError(Exception):
    pass


class Utilization(NamedTuple):
    gpu: int


class Memory(NamedTuple):
    used: int
    total: int


_CARDS = ["GPU-uuid-0", "GPU-uuid-1", "MIG-uuid-2"]


def nvmlInit() -> None:
    pass


def nvmlDeviceGetHandleByUUID(uuid: str) -> int:
    if uuid not in _CARDS:
        raise NVMLError("Not Found")
    return _CARDS.index(uuid)


def nvmlDeviceGetUtilizationRates(handle: int) -> Utilization:
    _whole(handle)
    return Utilization(75)


def nvmlDeviceGetMemoryInfo(handle: int) -> Memory:
    return Memory(1000 + handle, 2**34)


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:
    assert sensor == 0
    _whole(handle)
    return 41


def nvmlDeviceGetPowerUsage(handle: int) -> int:
    _whole(handle)
    return 123_400


def nvmlDeviceGetTotalEnergyConsumption(handle: int) -> int:
    _whole(handle)
    return 5_600


def _whole(handle: int) -> None:
    if _CARDS[handle].startswith("MIG"):
        raise NVMLError("Not Supported")
