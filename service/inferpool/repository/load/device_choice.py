"""Which devices the instances of a version run on, and what measurements depend on there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from inferpool.backends.base import Backend, LoadOptions
from inferpool.errors import RunsElsewhere
from inferpool.repository.config import ModelConfig
from inferpool.system.gpus import CPU, Driver, choose_devices, gpu_index

log = logging.getLogger(__name__)


class DeviceChoice:
    """Chooses devices by `model.toml`, the settings, and the GPUs of the machine.

    Attributes:
        own: the only device on which this process makes instances; None for all.
    """

    def __init__(self, devices: Sequence[str], driver: Driver, own: str | None) -> None:
        """`devices` are those of the settings, which hold for models that name none."""
        self.own = own
        self._settings_devices = tuple(devices)
        self._driver = driver

    def wanted(self, config: ModelConfig) -> tuple[str, ...]:
        """The devices that were asked for; one may be a word, such as `auto`."""
        return config.instances.devices or self._settings_devices

    def choose(self, backend: Backend, file: Path, config: ModelConfig) -> tuple[str, ...]:
        """The devices of all instances; raises LoadError if the model cannot run on those asked for."""
        return choose_devices(self.wanted(config), self._driver, lambda: backend.gpu_unavailable_reason(file))

    def check_own(self, backend: Backend, file: Path, config: ModelConfig) -> None:
        """Raise RunsElsewhere if this process has one device, and no instance of a version is there."""
        if self.own is not None:
            devices = self.choose(backend, file, config)
            if self.own not in devices:
                raise RunsElsewhere(devices)

    def choose_aloud(self, backend: Backend, file: Path, config: ModelConfig) -> tuple[str, ...]:
        """The same as `choose`, with a warning if the model does without the GPUs that there are."""
        wanted = self.wanted(config)
        devices = self.choose(backend, file, config)
        if devices == (CPU,) and wanted != devices and self._driver.gpus():
            log.warning(
                "%s is served on the CPU although there is a GPU: %s",
                file,
                backend.gpu_unavailable_reason(file),
            )
        return devices

    def measured_on(self, options: LoadOptions) -> list[str]:
        """The facts about a GPU that measurements and engines depend on; none on the CPU."""
        if options.device == CPU:
            return []
        gpu = self._driver.gpus()[gpu_index(options.device)]
        return [
            gpu.name,
            *map(
                str,
                (
                    gpu.memory_bytes,
                    options.gpu.tf32,
                    options.gpu.fp16,
                    options.gpu.memory_bytes,
                    options.gpu.graphs,
                ),
            ),
        ]
