"""From a file on disk to a pool that serves: load, check, prove, measure, start.

Everything that can be wrong with a version is found here, before it is ready.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from service.backends.base import (
    Backend,
    Described,
    LoadedModel,
    LoadOptions,
    backends_by_suffix,
    find_backend,
)
from service.codecs.image import ImageCodec
from service.codecs.labels import LabelsCodec, read_labels
from service.codecs.text import TextCodec
from service.devices import AUTO, CPU, Driver, cuda_driver, gpu_index, place
from service.errors import ConfigError, LoadError, UnfitForGpu
from service.machine import usable_cores
from service.metrics import Metrics
from service.pool.padding import Padding
from service.pool.padding_proof import prove_padding
from service.pool.plan import Plan, Planner, Wishes
from service.pool.pool import Pool
from service.pool.ports import Outbox, VersionKey
from service.pool.profile import Profile
from service.pool.proof import first_line
from service.pool.queue import Limits
from service.repository.cache import PlanCache
from service.repository.catalog import READY, BatchingView, VersionView
from service.repository.config import ModelConfig
from service.repository.instances import Instances
from service.repository.samples import check_samples, read_samples
from service.settings import Settings
from service.tensors import Signature, Tensors, names_text, shape_text

log = logging.getLogger(__name__)

LEAST_QUEUE_ROWS = 64
"""Rows that may wait however slow the model is: a burst of single requests is no overload."""


@dataclass(slots=True)
class Loaded:
    """A version that is ready: what the web side sees of it, its pool, and what is in memory."""

    view: VersionView
    pool: Pool
    instances: Instances

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
        options = self._options(config, folder, devices[0])
        instances = Instances(backend, file, self._clock)
        on_cpu = ""
        try:
            try:
                model = instances.load(options)
            except UnfitForGpu as error:
                if AUTO not in self._wanted(config):
                    raise
                log.warning("%s is served on the CPU: %s", file, error.detail)
                on_cpu = f"on the CPU, though there is a GPU: {error.detail}"
                devices, options = (CPU,), replace(options, device=CPU)
                model = instances.load(options)
            _check_described(config, folder, model.signature)
            image, text, classes = _codecs(config, folder, model.signature)
            samples = read_samples(folder, model.signature, text) if folder is not None else []
            rows = [inputs for sample in samples for inputs in sample.inputs]
            if text is not None:
                # First, for they are of the length that everything is measured by.
                rows.insert(0, text.made_up(text.unit))
            golden = [folder / "samples" / sample.name for sample in samples] if folder is not None else []
            plan = self._plan(file, config, backend, model, rows, golden, options, text)
            padding = _padding(text, model, plan) if text is not None else None
            if options.device != CPU:
                instances.drop(model)
                instances.on_gpus(devices, plan, options, rows)
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
        devices = place(wanted, self._driver, lambda: backend.lacks_gpu(file))
        if devices == (CPU,) and wanted != devices and self._driver.gpus():
            log.warning("%s is served on the CPU although there is a GPU: %s", file, backend.lacks_gpu(file))
        return devices

    def _options(self, config: ModelConfig, folder: Path | None, device: str) -> LoadOptions:
        return LoadOptions(
            device=device,
            cpu_nodes=config.gpu.cpu_nodes,
            tf32=config.gpu.tf32,
            memory_bytes=config.gpu.memory_bytes,
            inputs=tuple(Described(**tensor.model_dump()) for tensor in config.inputs),
            outputs=tuple(Described(**tensor.model_dump()) for tensor in config.outputs),
            samples=tuple(_raw_inputs(folder, config)) if folder is not None else (),
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
        wishes = Wishes(
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

    def _measured_on(self, options: LoadOptions) -> list[str]:
        """What makes measurements on one GPU worthless on another."""
        if options.device == CPU:
            return []
        gpu = self._driver.gpus()[gpu_index(options.device)]
        return [gpu.name, *map(str, (gpu.memory_bytes, options.tf32, options.memory_bytes))]

    def _pool(
        self,
        key: VersionKey,
        config: ModelConfig,
        plan: Plan,
        padding: Padding | None,
        instances: Instances,
    ) -> Pool:
        profile = Profile(plan.table)
        count = len(instances.models)
        row_load = 1 if padding is None else math.ceil(padding.longest / padding.unit)
        limits = Limits(
            batch_rows=plan.max_rows,
            queue_rows=config.queue.max_rows or self._queue_rows(plan, profile, row_load, count),
            queue_bytes=config.queue.max_bytes or self._settings.queue_bytes,
            delay_s=config.batching.max_delay_ms / 1000,
        )
        return Pool(
            key,
            limits,
            profile,
            self._outbox,
            self._metrics,
            self._clock,
            batched=plan.batched,
            padding=padding,
            most_joined_bytes=self._settings.in_flight_bytes,
            ladder=instances.ladder,
        )

    def _queue_rows(self, plan: Plan, profile: Profile, row_load: int, instances: int) -> int:
        """Rows worked off within `queue_ms` by the measured rate; the longest row counts `row_load`."""
        batch_s = profile.seconds(plan.max_rows) or 1e-3
        rows = instances * plan.max_rows / batch_s * self._settings.queue_ms / 1000
        return max(LEAST_QUEUE_ROWS * row_load, 4 * plan.max_rows, min(int(rows), 1_000_000))


def _codecs(
    config: ModelConfig, folder: Path | None, signature: Signature
) -> tuple[ImageCodec | None, TextCodec | None, LabelsCodec | None]:
    try:
        image = ImageCodec(config.image, signature) if config.image is not None else None
        text, classes = None, None
        if config.text is not None and folder is not None:
            file = _inside(folder, "text.tokenizer", config.text.tokenizer)
            text = TextCodec(config.text, signature, file)
        if config.labels is not None and folder is not None:
            names = read_labels(_inside(folder, "labels.file", config.labels.file))
            classes = LabelsCodec(config.labels, signature, names)
    except ConfigError as error:
        where = folder.name if folder is not None else ""
        raise ConfigError(f"{where}/model.toml: {error.detail}") from error
    return image, text, classes


def _padding(text: TextCodec, model: LoadedModel, plan: Plan) -> Padding:
    """How rows of different lengths are treated; raises LoadError where the longest cannot be run at all."""
    try:
        model.run(text.made_up(text.max_tokens, 1))
    except Exception as error:  # whatever the runtime raises is this version's fault
        raise LoadError(
            f"a row of {text.max_tokens} tokens cannot be run ({first_line(error)}); set text.max_tokens in"
            " model.toml to what the model takes, or bring the tokenizer that it was trained with"
        ) from error
    padding = Padding(text.fills, text.ids, text.unit, text.max_tokens, mask=text.mask)
    return prove_padding(model, text.made_up(text.unit), padding) if plan.batched else padding


def _raw_inputs(folder: Path, config: ModelConfig) -> Iterator[Any]:
    """The tensors of each golden sample as it is written; a file that is not JSON is complained of later."""
    for file in sorted(folder.glob("samples/*.json")):
        with suppress(OSError, orjson.JSONDecodeError):
            table = orjson.loads(file.read_bytes())
            if not isinstance(table, dict) or "inputs" not in table:
                continue
            inputs = table["inputs"]
            # Sentences say nothing of what the model itself takes.
            if config.text is None or (isinstance(inputs, dict) and config.text.input not in inputs):
                yield table["inputs"]


def _check_described(config: ModelConfig, folder: Path | None, signature: Signature) -> None:
    """Raise ConfigError where `model.toml` describes a tensor otherwise than the model has it."""
    where = f"{folder.name if folder is not None else ''}/model.toml"
    for table, tensors, specs in (
        ("inputs", config.inputs, signature.inputs_by_name),
        ("outputs", config.outputs, signature.outputs_by_name),
    ):
        for tensor in tensors:
            spec = specs.get(tensor.name)
            if spec is None:
                raise ConfigError(
                    f"{where}: {table}: the model has no {tensor.name}; it has {names_text(specs)}"
                )
            if tensor.datatype not in (None, spec.datatype):
                raise ConfigError(
                    f"{where}: {table}: {tensor.name} is {spec.datatype} in the model, not {tensor.datatype}"
                )
            if tensor.shape is not None and tensor.shape != spec.shape:
                raise ConfigError(
                    f"{where}: {table}: {tensor.name} has shape {shape_text(spec.shape)} in the model,"
                    f" not {shape_text(tensor.shape)}"
                )


def _inside(folder: Path, key: str, name: str) -> Path:
    """A file of the model's folder; raises ConfigError for one that is not in it, or is none."""
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()) or (file.exists() and not file.is_file()):
        raise ConfigError(f"{key}: {name} is no file in the model's folder")
    return file
