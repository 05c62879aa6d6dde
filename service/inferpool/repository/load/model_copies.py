"""The copies of a model in memory that a version's instances run. On the CPU all instances share one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from inferpool.backends.base import Backend, LoadedModel, LoadOptions
from inferpool.errors import LoadError, OutOfMemory
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.catalog import GpuView
from inferpool.system.gpus import CPU
from inferpool.system.held_files import hold_files

log = logging.getLogger(__name__)


class ModelCopies:
    """The copies of one version, while it is loaded and while it serves. Owns their memory.

    Attributes:
        models: a device and a model for each instance; several instances may have the same model.
        buckets: the batch sizes that the models run; None if any size runs as it is.
        gpu: what `/models` shows about GPUs; None on the CPU.
        takes_pixels: whether all models normalise pixels themselves.
    """

    def __init__(self, backend: Backend, file: Path) -> None:
        self.models: list[tuple[str, LoadedModel]] = []
        self.buckets: BatchBuckets | None = None
        self.gpu: GpuView | None = None
        self.takes_pixels = False
        self._backend = backend
        self._file = file
        self._owned: list[LoadedModel] = []
        self._then: list[Callable[[], None]] = []

    @property
    def owned(self) -> tuple[LoadedModel, ...]:
        """Every copy in memory."""
        return tuple(self._owned)

    @property
    def tensorrt(self) -> str | None:
        """The state of the upgrade to TensorRT, as a sentence; None if none was asked for."""
        return None

    def load(self, options: LoadOptions) -> LoadedModel:
        """Load one more copy of the model, which no change of its files affects; raises LoadError."""
        try:
            model = self._backend.load(self._file, options)
        except OutOfMemory as error:
            raise LoadError(error.detail) from error
        self._owned.append(model)
        hold_files(self._file)
        return model

    def drop(self, model: LoadedModel) -> None:
        """Free the memory of one copy."""
        self._owned.remove(model)
        model.close()

    def share(self, model: LoadedModel, count: int) -> None:
        """Let `count` instances on the CPU share `model`."""
        self.models = [(CPU, model)] * count

    def finish(self) -> None:
        """Do what remains once every instance has started."""

    def await_upgrade(self, timeout_s: float) -> bool:
        """Wait until the upgrade to TensorRT has ended, if there is one; False after `timeout_s`."""
        return True

    def after_close(self, then: Callable[[], None]) -> None:
        """Call `then` when the memory is free."""
        self._then.append(then)

    def close(self) -> None:
        """Free all memory. No run is in progress and none follows."""
        while self._owned:
            try:
                self._owned.pop().close()
            except Exception:
                log.exception("%s: the memory of a copy could not be given back", self._file)
        while self._then:
            self._then.pop()()
