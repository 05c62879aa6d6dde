"""From a file on disk to a pool that serves: load, check, prove, measure, start.

Everything that can be wrong with a version is found here, before it is ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.backends.base import Backend, LoadedModel, LoadOptions, backends_by_suffix, find_backend
from service.codecs.image import ImageCodec
from service.codecs.labels import LabelsCodec, read_labels
from service.errors import ConfigError
from service.machine import usable_cores
from service.metrics import Metrics
from service.pool.plan import Plan, Planner, Wishes
from service.pool.pool import Pool
from service.pool.ports import Outbox, VersionKey
from service.pool.profile import Profile
from service.pool.queue import Limits
from service.repository.cache import PlanCache
from service.repository.catalog import READY, BatchingView, VersionView
from service.repository.config import ModelConfig
from service.repository.samples import Sample, check_samples, read_samples
from service.settings import Settings
from service.tensors import Signature

log = logging.getLogger(__name__)

LEAST_QUEUE_ROWS = 64
"""Rows that may wait however slow the model is: a burst of single requests is no overload."""


@dataclass(slots=True)
class Loaded:
    """A version that is ready: what the web side sees of it, its pool, and the model in memory."""

    view: VersionView
    pool: Pool
    model: LoadedModel

    def close(self) -> None:
        """Give back the model's memory; its instances have ended."""
        self.model.close()


class Loader:
    """Loads versions for one server."""

    def __init__(
        self, settings: Settings, outbox: Outbox, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._outbox = outbox
        self._metrics = metrics
        self._clock = clock
        self._cache = PlanCache(settings.cache_dir)
        self._cores = settings.threads or usable_cores()

    def load(self, key: VersionKey, file: Path, folder: Path | None, config: ModelConfig) -> Loaded:
        """Load `file` as version `key`; `folder` has its samples and labels.

        Raises LoadError, whose detail is the reason that `/models` shows.
        """
        began = self._clock()
        name = config.backend or backends_by_suffix().get(file.suffix, "")
        backend = find_backend(name)
        model = backend.load(file, LoadOptions(threads=1))
        try:
            image, classes = _codecs(config, folder, model.signature)
            samples = read_samples(folder, model.signature) if folder is not None else []
            plan = self._plan(file, config, backend, model, samples, folder)
            if plan.threads != 1:
                model.close()
                model = backend.load(file, LoadOptions(threads=plan.threads))
            check_samples(samples, model)
            pool = self._pool(key, config, plan)
            for _ in range(plan.instances):
                pool.start_instance(model, "cpu")
        except BaseException:
            model.close()
            raise
        view = VersionView(
            key=key,
            state=READY,
            backend=backend.describe(),
            signature=model.signature,
            batching=BatchingView(plan.batched, plan.reason, plan.max_rows, config.batching.max_delay_ms),
            threads=plan.threads,
            timeout_s=config.timeout_ms / 1000 if config.timeout_ms else None,
            image=image,
            classes=classes,
            load_s=self._clock() - began,
        )
        return Loaded(view, pool, model)

    def _plan(
        self,
        file: Path,
        config: ModelConfig,
        backend: Backend,
        model: LoadedModel,
        samples: list[Sample],
        folder: Path | None,
    ) -> Plan:
        wishes = Wishes(
            cores=self._cores,
            budget_s=self._settings.measure_ms / 1000,
            batching=config.batching.enabled,
            max_rows=config.batching.max_rows,
            instances=config.instances.count,
            threads=config.instances.threads,
        )
        golden = [folder / "samples" / sample.name for sample in samples] if folder is not None else []
        known = self._cache.find(file, golden, wishes, backend.describe())
        if known is not None:
            return known

        def load(threads: int) -> LoadedModel:
            return backend.load(file, LoadOptions(threads=threads))

        plan = Planner(load, wishes, self._clock).make(model, [sample.inputs for sample in samples])
        self._cache.keep(file, golden, wishes, backend.describe(), plan)
        return plan

    def _pool(self, key: VersionKey, config: ModelConfig, plan: Plan) -> Pool:
        profile = Profile(plan.table)
        limits = Limits(
            batch_rows=plan.max_rows,
            queue_rows=config.queue.max_rows or self._queue_rows(plan, profile),
            queue_bytes=config.queue.max_bytes or self._settings.queue_bytes,
            delay_s=config.batching.max_delay_ms / 1000,
        )
        return Pool(key, limits, profile, self._outbox, self._metrics, self._clock, batched=plan.batched)

    def _queue_rows(self, plan: Plan, profile: Profile) -> int:
        """Rows that are worked off within `queue_ms` by the measured rate."""
        batch_s = profile.seconds(plan.max_rows) or 1e-3
        rows = plan.instances * plan.max_rows / batch_s * self._settings.queue_ms / 1000
        return max(LEAST_QUEUE_ROWS, 4 * plan.max_rows, min(int(rows), 1_000_000))


def _codecs(
    config: ModelConfig, folder: Path | None, signature: Signature
) -> tuple[ImageCodec | None, LabelsCodec | None]:
    try:
        image = ImageCodec(config.image, signature) if config.image is not None else None
        classes = None
        if config.labels is not None and folder is not None:
            classes = LabelsCodec(config.labels, signature, read_labels(folder / config.labels.file))
    except ConfigError as error:
        where = folder.name if folder is not None else ""
        raise ConfigError(f"{where}/model.toml: {error.detail}") from error
    return image, classes
