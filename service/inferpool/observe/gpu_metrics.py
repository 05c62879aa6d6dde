"""Readings of the GPUs in use for `/metrics`, taken from NVIDIA's management library (NVML).

A GPU that lacks a reading has no such series: a MIG device, for example, has no utilisation of its own.
Without the driver or `nvidia-ml-py` there are no GPU series at all, which is not an error.
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

_CORE_SENSOR: Final = 0
"""NVML_TEMPERATURE_GPU in nvml.h, the only sensor that every GPU has."""

_READINGS: Final[tuple[tuple[str, Callable[[Any, Any], float]], ...]] = (
    ("gpu_utilization_ratio", lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
    ("gpu_memory_used_bytes", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
    ("gpu_memory_total_bytes", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
    ("gpu_temperature_celsius", lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, _CORE_SENSOR)),
    ("gpu_power_watts", lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
    ("gpu_energy_joules_total", lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000),
)
"""Metric name and reader. NVML uses per cent, milliwatts and millijoules."""


class GpuReadings:
    """A source of metrics that reads the GPUs at each scrape."""

    def __init__(self, nvml: Any, gpus: Sequence[Gpu]) -> None:
        """Keep the initialised module `pynvml` and those of the `gpus` that it knows."""
        self._nvml = nvml
        self._handles = [(gpu.device, handle) for gpu in gpus if (handle := self._handle(gpu)) is not None]

    def __call__(self) -> Iterable[Sample]:
        """Read every GPU and yield its samples."""
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
    """The source for `gpus`; None if there are none or NVML is not available."""
    if not gpus:
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        log.warning(
            "GPU metrics are off: nvidia-ml-py is not installed; install it with: %s", install_command("gpu")
        )
    except nvml.NVMLError as error:
        log.warning("GPU metrics are off: NVML did not start: %s", error)
    else:
        return GpuReadings(nvml, gpus)
    return None
