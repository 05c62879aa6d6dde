"""What NVIDIA's management library tells of the GPUs in use, for `/metrics`.

A GPU that does not tell something (a MIG device has no clock of its own, so no utilisation) has no such
series. Without the driver, or without `nvidia-ml-py`, there are none at all, and that is no error.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

from inferpool.observe.metrics import Sample
from inferpool.system.gpus import Gpu
from inferpool.system.install_hints import install_command

log = logging.getLogger(__name__)

_CORE: Final = 0
"""NVML_TEMPERATURE_GPU of nvml.h: the only sensor that every card has."""

_READINGS: Final[tuple[tuple[str, Callable[[Any, Any], float]], ...]] = (
    ("gpu_utilization_ratio", lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
    ("gpu_memory_used_bytes", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
    ("gpu_memory_total_bytes", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
    ("gpu_temperature_celsius", lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, _CORE)),
    ("gpu_power_watts", lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
    ("gpu_energy_joules_total", lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000),
)
"""Metrics, and how NVML tells them: in per cent, milliwatts and millijoules."""


class GpuReadings:
    """A source of metrics: what the GPUs tell at this moment."""

    def __init__(self, nvml: Any, gpus: Sequence[Gpu]) -> None:
        """`nvml` is the module `pynvml`, initialised; GPUs that it does not know are left out."""
        self._nvml = nvml
        self._handles = [(gpu.device, handle) for gpu in gpus if (handle := self._handle(gpu)) is not None]

    def __call__(self) -> Iterable[Sample]:
        """The series that there are, read now."""
        for device, handle in self._handles:
            for name, read in _READINGS:
                with suppress(self._nvml.NVMLError):
                    yield name, (device,), float(read(self._nvml, handle))

    def _handle(self, gpu: Gpu) -> Any:
        for kind in ("GPU", "MIG"):
            with suppress(self._nvml.NVMLError):
                return self._nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{gpu.uuid}")
        return None


def gpu_readings(gpus: Sequence[Gpu]) -> GpuReadings | None:
    """The source for `gpus`; None where there are none, or NVML is not to be had."""
    if not gpus:
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        log.warning("no metrics of GPUs: nvidia-ml-py is not installed: %s", install_command("gpu"))
    except nvml.NVMLError as error:
        log.warning("no metrics of GPUs: %s", error)
    else:
        return GpuReadings(nvml, gpus)
    return None
