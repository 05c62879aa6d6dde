"""Loads a version: from a file on disk, over checks and measurements, to a pool that serves.

The loader finds everything that can be wrong with a version before the version is ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from inferpool.backends.base import Backend, DeviceModel, GpuOptions, LoadedModel, LoadOptions, TensorHint
from inferpool.backends.registry import backends_by_suffix, find_backend
from inferpool.codecs.labels import LabelsCodec
from inferpool.codecs.text import TextCodec
from inferpool.errors import LoadError, Reason, RunsElsewhere, UnfitForGpu
from inferpool.observe.metrics import Metrics
from inferpool.pool.padding import Padding
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Outbox, VersionKey
from inferpool.repository.catalog import READY, VersionView
from inferpool.repository.codec_factory import CodecSource, make_codecs, read_codec_source
from inferpool.repository.config import ModelConfig, check_tensors
from inferpool.repository.lifecycle import CHECK_SAMPLES, LOAD, VERIFY, WARM, Phase
from inferpool.repository.load.batching_check import UNREAD
from inferpool.repository.load.declared_shapes import corrected, without_names
from inferpool.repository.load.device_choice import DeviceChoice
from inferpool.repository.load.golden_samples import (
    GoldenSample,
    check_samples,
    kept_rows,
    raw_inputs,
    read_samples,
    shown_samples,
)
from inferpool.repository.load.load_files import LoadFiles, open_files
from inferpool.repository.load.model_copies import ModelCopies
from inferpool.repository.load.plan import Plan, PlanConstraints
from inferpool.repository.load.plan_cache import PlanCache
from inferpool.repository.load.planner import Planner
from inferpool.repository.load.pool_factory import PoolFactory
from inferpool.repository.load.run_timer import PrepareRun, prepare_run
from inferpool.repository.load.text_padding import make_padding, make_texts
from inferpool.repository.load.view_facts import (
    batching_view,
    cache_digest,
    drift,
    sampling,
    shown_digest,
)
from inferpool.settings import Settings
from inferpool.system.cpu import usable_cores
from inferpool.system.cpu_wait import CpuWait
from inferpool.system.gpus import AUTO, CPU, Driver, cuda_driver, gpu_support
from inferpool.system.huge_pages import anonymous_mappings, collapse_since
from inferpool.system.memory import large_blocks_mapped, memory_limit, release_freed_memory
from inferpool.system.priority import at_falling_priority, at_low_priority, call_directly
from inferpool.tensors import Tensors

if TYPE_CHECKING:
    from inferpool.codecs.image import ImageCodec
    from inferpool.repository.load.gpu.gpu_copies import GpuCopies

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class LoadedVersion:
    """A version that is ready: its view for the web side, its pool and its copies in memory.

    `codec_source` has what the codecs of `view` were made from, until nobody needs it any more. `waited` is
    the share of the time in which the thread that measured the version waited for a core.
    """

    view: VersionView
    pool: Pool
    copies: ModelCopies
    codec_source: CodecSource | None
    waited: float = 0.0

    def close(self) -> None:
        """Free the models' memory. The instances have ended."""
        self.copies.close()


class _Source(NamedTuple):
    """The sources from which a version is loaded.

    Attributes:
        remeasure: whether the plan that is kept is ignored.
        measures: whether a plan is made if none is kept.
    """

    file: Path
    folder: Path | None
    config: ModelConfig
    backend: Backend
    files: LoadFiles
    remeasure: bool
    measures: bool


class _Content(NamedTuple):
    """The facts about a model's inputs in the files beside it.

    Attributes:
        text: the codec of sentences; None if the model takes none.
        image: the codec of pictures; None if the model takes none.
        rows: inputs that the model is known to take.
        samples: the files of the golden samples.
    """

    text: TextCodec | None
    image: ImageCodec | None
    rows: list[Tensors]
    samples: list[Path]


class _Planned(NamedTuple):
    """A model in memory, and the plan by which it is to be served."""

    copies: ModelCopies
    model: LoadedModel
    unfit: str | None
    devices: tuple[str, ...]
    options: LoadOptions
    content: _Content
    samples: list[GoldenSample]
    codec_source: CodecSource
    classes: LabelsCodec | None
    plan: Plan
    plan_file: Path | None


class NotMeasured(Exception):
    """There is no plan for a version, and the load was to make none."""


class Loader:
    """Loads versions for one server."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        metrics: Metrics,
        clock: Callable[[], float],
        driver: Driver | None = None,
        *,
        remeasure: bool = False,
        plans: Mapping[str, str] | None = None,
        on_drop: Callable[[], None] = lambda: None,
        on_hung: Callable[[VersionKey, Reason], None] | None = None,
        device: str | None = None,
    ) -> None:
        """`driver` is the GPU driver; None is this machine's. `on_hung` is told of runs that do not stop.

        See `RunWatcher` for the latter. Only instances on `device` are made; None makes those on all devices.
        The others are those of `PlanCache`.
        """
        self._settings = settings
        self._clock = clock
        self._devices = DeviceChoice(settings.devices, driver or cuda_driver(), device)
        self._cache = PlanCache(
            settings.cache_dir,
            settings.plans_dir,
            remeasure=remeasure,
            plans=plans,
            on_drop=on_drop,
        )
        self._pools = PoolFactory(settings, outbox, metrics, clock, on_hung)
        self._cores = settings.threads or usable_cores()
        self._backends: dict[str, None] = {}

    def plans(self) -> Mapping[str, str]:
        """The plans by which this process has loaded versions, as `PlanCache.plans` returns them."""
        return self._cache.plans()

    def backends(self) -> list[str]:
        """The names of the backends with which this process has loaded versions."""
        return list(self._backends)

    def knows_plan(self, file: Path) -> bool:
        """Whether a plan for a model is likely to be kept; only a load tells for certain."""
        return self._cache.guess_threads(file, self._cores) is not None

    def take_plans(self, plans: Mapping[str, str]) -> None:
        """Know the plans that another process has made, as its `plans` returned them."""
        self._cache.take(plans)

    def is_for_cpu(self, file: Path, config: ModelConfig) -> bool:
        """Whether all instances of a version would be on the CPU, and this process makes those."""
        try:
            backend = find_backend(config.backend or backends_by_suffix().get(file.suffix, ""))
            return self._devices.own in (None, CPU) and self._devices.choose(backend, file, config) == (CPU,)
        except LoadError:
            return False

    def measure(
        self,
        key: VersionKey,
        file: Path,
        folder: Path | None,
        config: ModelConfig,
        enter: Callable[[Phase], None] = lambda phase: None,
        *,
        remeasure: bool = False,
    ) -> None:
        """Have a plan for `file`, which `plans` then has; the arguments are those of `load`.

        Nothing stays in memory. Raises LoadError.
        """
        enter(VERIFY)
        backend = find_backend(config.backend or backends_by_suffix().get(file.suffix, ""))
        self._check_size(file, beside=False)
        files = open_files(file, folder, config, backend, self._settings)
        try:
            source = _Source(files.file, files.folder, config, backend, files, remeasure, measures=True)
            self._find_plan(key, source, enter, beside=False).copies.close()
        finally:
            files.close()

    def load(
        self,
        key: VersionKey,
        file: Path,
        folder: Path | None,
        config: ModelConfig,
        enter: Callable[[Phase], None] = lambda phase: None,
        *,
        beside: bool = False,
        remeasure: bool = False,
        measures: bool = True,
    ) -> LoadedVersion:
        """Load `file` as version `key`; `folder` has its samples and labels.

        `enter` is told each phase when it begins, and may raise LoadCancelled to end the load. `beside` says
        that other versions serve meanwhile: the load leaves them the cores and the memory that they need.
        `remeasure` ignores the plan that is kept. Without `measures`, a version that has no plan raises
        NotMeasured.

        Raises LoadError, whose detail is the reason that `/models` shows, or RunsElsewhere.
        """
        began = self._clock()
        work = at_low_priority if beside else call_directly
        enter(VERIFY)
        backend = find_backend(config.backend or backends_by_suffix().get(file.suffix, ""))
        self._devices.check_own(backend, file, config)
        self._check_size(file, beside=beside)
        files = work(partial(open_files, file, folder, config, backend, self._settings))
        mapped = anonymous_mappings() if beside else []
        try:
            with large_blocks_mapped(beside=beside):
                loaded = self._load(
                    key,
                    _Source(files.file, files.folder, config, backend, files, remeasure, measures),
                    enter,
                    beside=beside,
                )
            if loaded.copies.tensorrt is None:
                files.close()
            else:
                # The upgrade loads the file once more.
                loaded.copies.after_close(files.close)
        except BaseException:
            files.close()
            raise
        # What loading and measuring have freed would otherwise stay with the C library.
        release_freed_memory()
        if beside:
            # Before any request uses the weights; a start does not wait. What was freed above takes no part.
            work(partial(collapse_since, mapped))
        loaded.view = replace(loaded.view, load_s=self._clock() - began)
        return loaded

    def _load(
        self,
        key: VersionKey,
        source: _Source,
        enter: Callable[[Phase], None],
        *,
        beside: bool,
    ) -> LoadedVersion:
        """Load a version from files that were checked."""
        work = at_low_priority if beside else call_directly
        config, backend = source.config, source.backend
        planned = self._find_plan(key, source, enter, beside=beside)
        copies, model, plan, options = planned.copies, planned.model, planned.plan, planned.options
        text, image, codec_source = planned.content.text, planned.content.image, planned.codec_source
        try:
            enter(WARM)
            padding = make_padding(text, model, batched=plan.batched) if text is not None else None
            if options.device == CPU:
                if plan.threads != options.threads:
                    copies.drop(model)
                    last = partial(copies.load, replace(options, threads=plan.threads))
                    model = _load_quietly(last, copies.drop, backend, plan.threads) if beside else last()
                copies.share(model, plan.instances)
            else:
                padding = self._prepare_gpus(source, planned, padding)
            if image is not None and copies.takes_pixels:
                image = image.without_normalisation()
                codec_source = replace(codec_source, takes_pixels=True)
            enter(CHECK_SAMPLES)
            for loaded in dict(copies.models).values():
                work(partial(check_samples, planned.samples, loaded))
            pool = self._pools.make(
                key, config, plan, padding, copies, partial(self._cache.drop, planned.plan_file)
            )
            for device, loaded in copies.models:
                pool.start_instance(loaded, device)
            copies.finish()
        except BaseException:
            copies.close()
            raise
        self._backends[backend.name] = None
        content_signature = model.signature if text is None else text.signature
        view = VersionView(
            key=key,
            state=READY,
            reason=planned.unfit or "",
            backend=" ".join(filter(None, (backend.describe(), model.form))),
            signature=corrected(content_signature, plan.shapes),
            batching=batching_view(plan, padding, config, backend, model, source.file, source.folder),
            threads=plan.threads,
            timeout_s=config.timeout_ms / 1000 if config.timeout_ms else None,
            image=image,
            text=text,
            padding=padding,
            row_cost=plan.row_cost,
            classes=planned.classes,
            gpu=copies.gpu,
            cache_digest=cache_digest(config, backend, source.files) if config.cache.enabled else None,
            sampling=sampling(config, content_signature, image, text),
            drift=drift(config, None if source.folder is None else source.file.parent),
            sample_rows=kept_rows(planned.samples) if text is None else {},
            digest=shown_digest(source.files),
            samples=shown_samples(planned.samples),
        )
        return LoadedVersion(view, pool, copies, codec_source, plan.waited)

    def _find_plan(
        self, key: VersionKey, source: _Source, enter: Callable[[Phase], None], *, beside: bool
    ) -> _Planned:
        """Load a first copy of a model, and find or make its plan."""
        work = at_low_priority if beside else call_directly
        config, folder = source.config, source.folder
        devices = self._devices.choose_aloud(source.backend, source.file, config)
        first = devices[0]
        if self._devices.own is not None:
            devices = (self._devices.own,)
        options = self._options(source, devices[0])
        guess = None
        if options.device == CPU and not source.remeasure:
            guess = self._cache.guess_threads(source.file, self._cores)
            options = replace(options, threads=guess or 1)
        enter(LOAD)
        copies, model, unfit = self._load_first(source, options, beside=beside)
        try:
            if unfit is not None:
                if self._devices.own not in (None, first):
                    raise RunsElsewhere([first])  # as its only copy, on the CPU
                devices, options = (CPU,), _for_cpu(options)
            check_tensors(config, folder, model.signature)
            codec_source = read_codec_source(config, folder, model.signature)
            image, text, classes = make_codecs(codec_source, key.model)
            # A sample shows what the model takes, whatever its file says of dimensions with one name.
            taken = without_names(model.signature)
            samples = read_samples(folder, taken, text) if folder is not None else []
            rows = [inputs for sample in samples for inputs in sample.inputs]
            if text is not None:
                # First, because these rows have the length that everything is measured by.
                rows.insert(0, text.made_up_rows(text.unit))
            files = [folder / "samples" / sample.name for sample in samples] if folder is not None else []
            content = _Content(text, image, rows, files)
            constraints = self._constraints(config, model, options, content)
            plan_file = work(partial(self._locate_plan, source, constraints, options, content))
            plan = None if source.remeasure else self._cache.find(plan_file)
            if plan is None:
                if not source.measures:
                    raise NotMeasured
                if options.threads != 1:
                    options = replace(options, threads=1)
                    copies.drop(model)
                    model = work(partial(copies.load, options))
                plan = work(partial(self._make_plan, source, model, options, constraints, content, enter))
                self._cache.keep(plan_file, plan)
            if options.device == CPU and plan.threads != guess:
                self._cache.keep_threads(source.file, self._cores, plan.threads)
        except BaseException:
            copies.close()
            raise
        return _Planned(
            copies, model, unfit, devices, options, content, samples, codec_source, classes, plan, plan_file
        )

    def _load_first(
        self, source: _Source, options: LoadOptions, *, beside: bool
    ) -> tuple[ModelCopies, LoadedModel, str | None]:
        """The same as `_first_copy`; beside others at a low priority, which no thread of a run keeps."""
        load = partial(self._first_copy, source, options)
        if not beside:
            return load()
        if options.device != CPU or options.threads == 1:
            return at_low_priority(load)
        return _load_quietly(load, lambda first: first[0].close(), source.backend, options.threads)

    def _check_size(self, file: Path, *, beside: bool) -> None:
        """Raise LoadError for a file that cannot fit into memory, before all of it is read."""
        memory = memory_limit()
        limit = self._settings.memory_bytes or memory.limit
        size = file.stat().st_size
        if beside and size > (free := max(0, limit - memory.held())):
            raise LoadError(
                f"{file.name} has {size} bytes; expected at most {free}, the memory that is free while the"
                " other versions serve; unload one of them first"
            )
        if size > limit:
            raise LoadError(
                f"{file.name} has {size} bytes; expected at most {limit}, the memory of the server"
            )

    def _first_copy(
        self, source: _Source, options: LoadOptions
    ) -> tuple[ModelCopies, LoadedModel, str | None]:
        """The first copy, and why it is on the CPU although there is a GPU; None if it is not."""
        if options.device != CPU:
            copies: ModelCopies = _gpu_copies(source)
            try:
                return copies, copies.load(options), None
            except UnfitForGpu as error:
                if AUTO not in self._devices.wanted(source.config):
                    raise
                log.warning("%s is served on the CPU: %s", source.file, error.detail)
                unfit = f"on the CPU, though there is a GPU: {error.detail}"
                options = _for_cpu(options)
        else:
            unfit = None
        copies = ModelCopies(source.backend, source.file)
        return copies, copies.load(options), unfit

    def _prepare_gpus(self, source: _Source, planned: _Planned, padding: Padding | None) -> Padding | None:
        """Exchange the model for a copy for each instance on each GPU; returns the padding of texts there."""
        from inferpool.repository.load.gpu.gpu_copies import GpuCopies, GpuInputs

        copies, model, options, content = planned.copies, planned.model, planned.options, planned.content
        assert isinstance(copies, GpuCopies)
        # Asked for even if the measured copy cannot capture, because the reason is the answer then.
        graphs = source.config.gpu.graphs and isinstance(model, DeviceModel)
        copies.drop(model)
        rounded = None if padding is None else replace(padding, rounded=True)
        normalise = None if content.image is None else content.image.normalisation
        texts = (
            make_texts(content.text, rounded)
            if isinstance(model, DeviceModel) and graphs and model.can_capture
            else []
        )

        def find_folder(device: str, version: str) -> Path:
            measured = self._devices.measured_on(replace(options, device=device))
            return self._cache.engine_folder(source.files, [version, *measured])

        copies.prepare(
            planned.devices,
            planned.plan,
            options.with_gpu(graphs=graphs, normalisation=normalise),
            GpuInputs(content.rows, texts, rounded),
            find_folder if source.config.gpu.tensorrt else None,
        )
        return padding if copies.buckets is None else rounded

    def _options(self, source: _Source, device: str) -> LoadOptions:
        config, folder = source.config, source.folder
        fp16 = config.gpu.fp16 and device != CPU
        return LoadOptions(
            device=device,
            gpu=GpuOptions(
                cpu_nodes=config.gpu.cpu_nodes,
                tf32=config.gpu.tf32,
                fp16=fp16,
                cache_dir=self._cache.beside(source.files) if fp16 else None,
                memory_bytes=config.gpu.memory_bytes,
                # For the measurements, which are made as the instances will run.
                graphs=config.gpu.graphs and device != CPU,
            ),
            inputs=tuple(TensorHint(**tensor.model_dump()) for tensor in config.inputs),
            outputs=tuple(TensorHint(**tensor.model_dump()) for tensor in config.outputs),
            samples=tuple(raw_inputs(folder, config)) if folder is not None else (),
            trusted=source.files.trusted,
            sha256=frozenset(digest.lower() for digest in config.sha256 or ()),
        )

    def _constraints(
        self, config: ModelConfig, model: LoadedModel, options: LoadOptions, content: _Content
    ) -> PlanConstraints:
        return PlanConstraints(
            cores=self._cores,
            budget_s=self._settings.measure_ms / 1000,
            batching=config.batching.enabled,
            max_rows=min(filter(None, (config.batching.max_rows, model.max_rows)), default=None),
            instances=config.instances.count,
            threads=config.instances.threads,
            gpu=options.device != CPU,
            weighed=content.text is None,
        )

    def _locate_plan(
        self, source: _Source, constraints: PlanConstraints, options: LoadOptions, content: _Content
    ) -> Path | None:
        """Where the plan for this model on this machine is kept; see `PlanCache.locate`."""
        config, text = source.config, content.text
        described: tuple[object, ...] = (*config.inputs, *config.outputs)
        if text is not None:
            described = (*described, text.fills, config.text, text.vocabulary_size)
        # A plan depends on what model.toml says of the tensors.
        runtime = " ".join(
            (source.backend.describe(), *map(repr, described), *self._devices.measured_on(options))
        )
        return self._cache.locate(source.files, content.samples, constraints, runtime)

    def _make_plan(
        self,
        source: _Source,
        model: LoadedModel,
        options: LoadOptions,
        constraints: PlanConstraints,
        content: _Content,
        enter: Callable[[Phase], None],
    ) -> Plan:
        """Measure `model`, which has one thread a run, and copies of it."""

        def load(threads: int) -> LoadedModel:
            return source.backend.load(source.file, replace(options, threads=threads))

        graph = source.backend.read_rows(source.file, options) if constraints.batching else UNREAD
        prepare = prepare_run if options.device == CPU else _prepare_gpu_run()
        wait = CpuWait()
        plan = Planner(load, constraints, self._clock, prepare, enter).make(model, content.rows, graph)
        if options.device == CPU and constraints.budget_s:
            plan = replace(plan, waited=wait.share())
        return plan


def _gpu_copies(source: _Source) -> GpuCopies:
    """The copies of a model on GPUs; raises LoadError if this installation has no code for GPUs."""
    with gpu_support():
        from inferpool.repository.load.gpu.gpu_copies import GpuCopies
    return GpuCopies(source.backend, source.file)


def _prepare_gpu_run() -> PrepareRun:
    """How the runs that are measured on a GPU are prepared."""
    from inferpool.repository.load.gpu.replayed_runs import prepare_replayed_run

    return prepare_replayed_run


def _load_quietly(load: Callable[[], T], drop: Callable[[T], None], backend: Backend, threads: int) -> T:
    """Load a copy that serves at a low priority. The `threads` of its runs have the usual one.

    `drop` frees a copy whose threads have got the low priority.
    """
    if not backend.starts_threads_first:
        return load()
    loaded, is_usual = at_falling_priority(load, threads - 1)
    if is_usual:
        return loaded
    drop(loaded)
    return load()


def _for_cpu(options: LoadOptions) -> LoadOptions:
    """The same options for the CPU."""
    return replace(options.with_gpu(fp16=False, graphs=False), device=CPU)
