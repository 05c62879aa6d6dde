"""From a file on disk to a pool that serves: load, check, prove, measure, start.

Everything that can be wrong with a version is found here, before it is ready.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from inferpool.backends.base import (
    Backend,
    DeviceModel,
    LoadedModel,
    LoadOptions,
    TensorHint,
    backends_by_suffix,
    find_backend,
)
from inferpool.codecs.text import TextCodec
from inferpool.errors import UnfitForGpu
from inferpool.observe.metrics import Metrics
from inferpool.pool.entry_queue import Limits
from inferpool.pool.latency_model import Profile
from inferpool.pool.padding import Padding
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Outbox, VersionKey
from inferpool.repository.catalog import READY, BatchingView, VersionView
from inferpool.repository.config import ModelConfig
from inferpool.repository.load.codec_factory import make_codecs, make_padding, run_texts
from inferpool.repository.load.golden_samples import check_samples, raw_inputs, read_samples
from inferpool.repository.load.model_copies import ModelCopies
from inferpool.repository.load.plan_cache import PlanCache
from inferpool.repository.load.planner import Plan, PlanConstraints, Planner
from inferpool.repository.load.tensor_hints import check_described
from inferpool.settings import Settings
from inferpool.system.cpu import usable_cores
from inferpool.system.gpus import AUTO, CPU, Driver, cuda_driver, gpu_index, place
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

LEAST_QUEUE_ROWS = 64
"""Rows that may wait however slow the model is: a burst of single requests is no overload."""


@dataclass(slots=True)
class Loaded:
    """A version that is ready: what the web side sees of it, its pool, and what is in memory."""

    view: VersionView
    pool: Pool
    instances: ModelCopies

    def close(self) -> None:
        """Give back the models' memory; the instances have ended."""
        self.instances.close()


class Loader:
    """Loads versions for one server."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        metrics: Metrics,
        clock: Callable[[], float],
        driver: Driver | None = None,
    ) -> None:
        """`driver` is that of the GPUs; None is this machine's."""
        self._settings = settings
        self._outbox = outbox
        self._metrics = metrics
        self._clock = clock
        self._driver = driver or cuda_driver()
        self._cache = PlanCache(settings.cache_dir)
        self._cores = settings.threads or usable_cores()

    def load(self, key: VersionKey, file: Path, folder: Path | None, config: ModelConfig) -> Loaded:
        """Load `file` as version `key`; `folder` has its samples and labels.

        Raises LoadError, whose detail is the reason that `/models` shows.
        """
        began = self._clock()
        name = config.backend or backends_by_suffix().get(file.suffix, "")
        backend = find_backend(name)
        devices = self._devices(config, backend, file)
        options = self._options(config, file, folder, devices[0])
        instances = ModelCopies(backend, file, self._clock)
        on_cpu = ""
        try:
            try:
                model = instances.load(options)
            except UnfitForGpu as error:
                if AUTO not in self._wanted(config):
                    raise
                log.warning("%s is served on the CPU: %s", file, error.detail)
                on_cpu = f"on the CPU, though there is a GPU: {error.detail}"
                devices, options = (CPU,), replace(options, device=CPU, fp16=False)
                model = instances.load(options)
            check_described(config, folder, model.signature)
            image, text, classes = make_codecs(config, folder, model.signature)
            samples = read_samples(folder, model.signature, text) if folder is not None else []
            rows = [inputs for sample in samples for inputs in sample.inputs]
            if text is not None:
                # First, for they are of the length that everything is measured by.
                rows.insert(0, text.made_up(text.unit))
            golden = [folder / "samples" / sample.name for sample in samples] if folder is not None else []
            plan = self._plan(file, config, backend, model, rows, golden, options, text)
            padding = make_padding(text, model, batched=plan.batched) if text is not None else None
            if options.device != CPU:
                graphs = config.gpu.graphs and isinstance(model, DeviceModel) and model.capturable
                instances.drop(model)
                engines = partial(self._engine_folder, file, options) if config.gpu.tensorrt else None
                rounded = None if padding is None else replace(padding, rounded=True)
                normalise = None if image is None else image.normalisation
                on_card = replace(options, graphs=graphs, normalise=normalise)
                texts = run_texts(text, rounded) if graphs else []
                instances.on_gpus(devices, plan, on_card, rows, rounded, texts, engines)
                if instances.ladder is not None:
                    padding = rounded
                if image is not None and instances.normalise:
                    image = image.leaving_pixels()
            else:
                if plan.threads != 1:
                    instances.drop(model)
                    model = instances.load(replace(options, threads=plan.threads))
                instances.on_cpu(model, plan.instances)
            for loaded in dict(instances.models).values():
                check_samples(samples, loaded)
            pool = self._pool(key, config, plan, padding, instances)
            for device, loaded in instances.models:
                pool.start_instance(loaded, device)
            instances.await_begun()
        except BaseException:
            instances.close()
            raise
        reason = "; ".join(filter(None, (plan.reason, padding.reason if padding is not None else "")))
        view = VersionView(
            key=key,
            state=READY,
            reason=on_cpu,
            backend=" ".join(filter(None, (backend.describe(), model.form))),
            signature=model.signature if text is None else text.signature,
            batching=BatchingView(plan.batched, reason, plan.max_rows, config.batching.max_delay_ms),
            threads=plan.threads,
            timeout_s=config.timeout_ms / 1000 if config.timeout_ms else None,
            image=image,
            text=text,
            padding=padding,
            classes=classes,
            gpu=instances.gpu,
            load_s=self._clock() - began,
        )
        return Loaded(view, pool, instances)

    def _wanted(self, config: ModelConfig) -> tuple[str, ...]:
        return config.instances.devices or self._settings.devices

    def _devices(self, config: ModelConfig, backend: Backend, file: Path) -> tuple[str, ...]:
        """Where the instances go; raises LoadError where that cannot be."""
        wanted = self._wanted(config)
        devices = place(wanted, self._driver, lambda: backend.gpu_unavailable_reason(file))
        if devices == (CPU,) and wanted != devices and self._driver.gpus():
            log.warning(
                "%s is served on the CPU although there is a GPU: %s",
                file,
                backend.gpu_unavailable_reason(file),
            )
        return devices

    def _options(self, config: ModelConfig, file: Path, folder: Path | None, device: str) -> LoadOptions:
        fp16 = config.gpu.fp16 and device != CPU
        return LoadOptions(
            device=device,
            cpu_nodes=config.gpu.cpu_nodes,
            tf32=config.gpu.tf32,
            fp16=fp16,
            kept=self._cache.beside(file) if fp16 else None,
            memory_bytes=config.gpu.memory_bytes,
            inputs=tuple(TensorHint(**tensor.model_dump()) for tensor in config.inputs),
            outputs=tuple(TensorHint(**tensor.model_dump()) for tensor in config.outputs),
            samples=tuple(raw_inputs(folder, config)) if folder is not None else (),
            trusted=self._settings.trust,
            sha256=frozenset(digest.lower() for digest in config.sha256 or ()),
        )

    def _plan(
        self,
        file: Path,
        config: ModelConfig,
        backend: Backend,
        model: LoadedModel,
        rows: list[Tensors],
        golden: list[Path],
        options: LoadOptions,
        text: TextCodec | None,
    ) -> Plan:
        wishes = PlanConstraints(
            cores=self._cores,
            budget_s=self._settings.measure_ms / 1000,
            batching=config.batching.enabled,
            max_rows=min(filter(None, (config.batching.max_rows, model.max_rows)), default=None),
            instances=config.instances.count,
            threads=config.instances.threads,
            gpu=options.device != CPU,
        )
        described: tuple[object, ...] = (*config.inputs, *config.outputs)
        if text is not None:
            described = (*described, text.fills, config.text, text.words)
        # What the owner says of a model's tensors is part of what is measured.
        runtime = " ".join((backend.describe(), *map(repr, described), *self._measured_on(options)))
        known = self._cache.find(file, golden, wishes, runtime)
        if known is not None:
            return known

        def load(threads: int) -> LoadedModel:
            return backend.load(file, replace(options, threads=threads))

        plan = Planner(load, wishes, self._clock).make(model, rows)
        self._cache.keep(file, golden, wishes, runtime, plan)
        return plan

    def _engine_folder(self, file: Path, options: LoadOptions, device: str, version: str) -> Path:
        """Where an engine of `file` for `device` is kept, which holds for that `version` alone."""
        measured = self._measured_on(replace(options, device=device))
        return self._cache.engine_folder(file, [version, *measured])

    def _measured_on(self, options: LoadOptions) -> list[str]:
        """What makes measurements on one GPU worthless on another."""
        if options.device == CPU:
            return []
        gpu = self._driver.gpus()[gpu_index(options.device)]
        return [
            gpu.name,
            *map(str, (gpu.memory_bytes, options.tf32, options.fp16, options.memory_bytes)),
        ]

    def _pool(
        self,
        key: VersionKey,
        config: ModelConfig,
        plan: Plan,
        padding: Padding | None,
        instances: ModelCopies,
    ) -> Pool:
        row_load = 1 if padding is None else math.ceil(padding.longest / padding.unit)
        limits = Limits(
            batch_rows=plan.max_rows,
            queue_rows=config.queue.max_rows or LEAST_QUEUE_ROWS * row_load,
            queue_bytes=config.queue.max_bytes or self._settings.queue_bytes,
            queue_s=math.inf if config.queue.max_rows else self._settings.queue_ms / 1000,
            least_rows=LEAST_QUEUE_ROWS * row_load,
            delay_s=config.batching.max_delay_ms / 1000,
        )
        return Pool(
            key,
            limits,
            Profile(plan.table),
            self._outbox,
            self._metrics,
            self._clock,
            batched=plan.batched,
            padding=padding,
            most_joined_bytes=self._settings.in_flight_bytes,
            ladder=instances.ladder,
        )
