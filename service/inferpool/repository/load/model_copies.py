"""The models in memory that a version's instances run: one for all on the CPU, one each on GPUs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from inferpool.backends.base import Backend, DeviceModel, LoadedModel, LoadOptions
from inferpool.errors import LoadError, OutOfMemory
from inferpool.pixel_table import Normalisation
from inferpool.pool.buckets import BatchBuckets, BucketedModel
from inferpool.pool.hot_swap import HotSwapModel
from inferpool.pool.padding import Padding
from inferpool.repository.catalog import GpuView
from inferpool.repository.load.batching_check import runnable
from inferpool.repository.load.gpu.bucket_warmup import warm_up
from inferpool.repository.load.gpu.graph_capture import capture
from inferpool.repository.load.gpu.pixel_check import try_pixels
from inferpool.repository.load.gpu.precision import Difference, Reference, reference
from inferpool.repository.load.gpu.tensorrt_upgrade import Folder, TensorRTUpgrade
from inferpool.repository.load.planner import Plan, rows_of
from inferpool.system.gpus import CPU
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)


class ModelCopies:
    """What a version has in memory while it serves, or is being loaded.

    Attributes:
        models: a model for each instance, with its device; the same one may be there several times.
        ladder: the batch sizes that they run; None where any size runs as it is.
        gpu: what `/models` shows of GPUs; None on the CPU.
        engines: the work on engines of TensorRT, where they are wished for.
        normalise: whether every one of them takes pixels, as it was asked to.
    """

    def __init__(self, backend: Backend, file: Path, clock: Callable[[], float]) -> None:
        self.models: list[tuple[str, LoadedModel]] = []
        self.ladder: BatchBuckets | None = None
        self.gpu: GpuView | None = None
        self.engines: TensorRTUpgrade | None = None
        self.normalise = False
        self._backend = backend
        self._file = file
        self._clock = clock
        self._owned: list[LoadedModel] = []
        self._begun: list[threading.Event] = []

    @property
    def tensorrt(self) -> str | None:
        """What has become of the wish for TensorRT."""
        return None if self.engines is None else self.engines.status

    def load(self, options: LoadOptions) -> LoadedModel:
        """One more copy of the model; raises LoadError."""
        try:
            model = self._backend.load(self._file, options)
        except OutOfMemory as error:
            raise LoadError(error.detail) from error
        self._owned.append(model)
        if options.device != CPU and (options.fp16 or options.tf32):
            model.rounding = "FP16"  # TF32 has as many digits
        return model

    def drop(self, model: LoadedModel) -> None:
        """Give back the memory of one copy."""
        self._owned.remove(model)
        model.close()

    def on_cpu(self, model: LoadedModel, count: int) -> None:
        """Let `count` instances share `model`."""
        self.models = [(CPU, model)] * count

    def on_gpus(
        self,
        devices: Sequence[str],
        plan: Plan,
        options: LoadOptions,
        samples: Sequence[Tensors],
        padding: Padding | None = None,
        texts: Sequence[Tensors] = (),
        engines: Folder | None = None,
    ) -> None:
        """Load a copy for each instance on each device, and run every rung; raises LoadError.

        `samples` are inputs that the model is known to take; `padding` is for rows of tokens, and `texts`
        are such of every length that runs have then; `engines` says where engines of TensorRT are kept,
        where they are wished for.
        """
        # Before there is anything else on the card: in FP32 a model takes twice the memory of FP16.
        exact, unmeasured = self._exact(replace(options, device=devices[0]), samples)
        ladder = BatchBuckets(plan.rungs) if plan.rungs else None
        fault = unfit = ""
        loaded: list[tuple[str, LoadedModel]] = []
        for device in [device for device in devices for _ in range(plan.instances)]:
            model = self.load(replace(options, device=device))
            if isinstance(model, DeviceModel) and options.graphs and model.capturable:
                self._begun.append(threading.Event())
                model.first = partial(self._capture, model, samples, texts, self._begun[-1])
            if ladder is not None and isinstance(model, DeviceModel):
                try:
                    fault = fault or warm_up(model, ladder, samples, self._clock)
                except OutOfMemory as error:
                    raise LoadError(f"{device} has no memory for a single row: {error.detail}") from error
            loaded.append((device, model))
        if ladder is not None and not fault:
            self.ladder = ladder
        wish = options.normalise
        if wish is not None:
            unfit = _unfit_for_pixels(loaded, wish, self.ladder, plan)
            self.normalise = not unfit
            options = replace(options, normalise=None if unfit else wish)
        if engines is not None:
            loaded = self._switchable(loaded, options, samples, engines)
        if self.ladder is not None:
            loaded = [
                (
                    device,
                    BucketedModel(model, self.ladder, padding) if isinstance(model, DeviceModel) else model,
                )
                for device, model in loaded
            ]
        self.models = loaded
        rounding = _rounding(options)
        found = exact.difference(loaded[0][1], rounding) if exact is not None else None
        self.gpu = GpuView(
            cpu_nodes=dict(loaded[0][1].cpu_nodes),
            padding=_padding(plan, fault, padding),
            precision=_precision(rounding, found, unmeasured),
            difference=found,
            graphs=_graphs(self._owned),
            pixels=_pixels(wish, devices, unfit),
        )
        if self.gpu.cpu_nodes:
            log.warning("%s: nodes that run on the CPU: %s", self._file, self.gpu.cpu_nodes)

    def await_begun(self) -> None:
        """Block until every instance, once started, is ready for its first batch."""
        for begun in self._begun:
            begun.wait()
        if self.engines is not None:
            self.engines.start()
        if self.gpu is not None:
            self.gpu = replace(self.gpu, graphs=_graphs(self._owned))

    def close(self) -> None:
        """Give back all memory; no run is under way and none follows."""
        if self.engines is not None:
            self.engines.close()
        while self._owned:
            try:
                self._owned.pop().close()
            except Exception:
                log.exception("%s: the memory of a copy could not be given back", self._file)

    def _switchable(
        self,
        loaded: Sequence[tuple[str, LoadedModel]],
        options: LoadOptions,
        samples: Sequence[Tensors],
        folder: Folder,
    ) -> list[tuple[str, LoadedModel]]:
        """The models, in such a form that engines can take their places."""
        switches = [
            (device, HotSwapModel(model)) for device, model in loaded if isinstance(model, DeviceModel)
        ]
        self._owned = [switch for _, switch in switches]
        rows = runnable(switches[0][1], samples, self._clock)[0]
        if self.ladder is None:
            rows = samples[0] if samples else rows_of(rows, 1) if rows else {}
        self.engines = TensorRTUpgrade(self._backend, self._file, options, folder, self.ladder, rows)
        self.engines.prepare(switches)
        return [*switches]

    def _capture(
        self,
        model: DeviceModel,
        samples: Sequence[Tensors],
        texts: Sequence[Tensors],
        begun: threading.Event,
    ) -> None:
        try:
            capture(model, self.ladder, samples, self._clock, texts)
        finally:
            begun.set()

    def _exact(self, options: LoadOptions, samples: Sequence[Tensors]) -> tuple[Reference | None, str]:
        """What the model gives in FP32, if it is to serve otherwise, and why that is not known."""
        if not _rounding(options):
            return None, ""
        try:
            model = self.load(replace(options, tf32=False, fp16=False, graphs=False, normalise=None))
        except LoadError as error:
            return None, error.detail
        try:
            found = reference(model, samples, self._clock)
        except OutOfMemory as error:
            return None, error.detail
        finally:
            self.drop(model)
        return (found, "") if found.inputs else (None, "no rows could be run")


def _rounding(options: LoadOptions) -> str:
    """What the owner lets numbers be rounded to; empty where that is nothing."""
    if options.fp16:
        return "FP16, and TF32 in what stays FP32" if options.tf32 else "FP16"
    return "TF32" if options.tf32 else ""


def _precision(rounding: str, found: Difference | None, unmeasured: str) -> str:
    if not rounding:
        return "as the model says"
    if found is None:
        return f"{rounding}; how much that changes could not be measured: {unmeasured}"
    most = f"{found.relative:.1g} of their scale"
    return f"{rounding}; its outputs differ from those of FP32 by {most} at the most"


def _graphs(models: Sequence[LoadedModel]) -> bool | str:
    """Whether all of them replay their runs from CUDA graphs, or why one does not."""
    reasons = [model.graphs for model in models if isinstance(model, DeviceModel)]
    return next((reason for reason in reasons if reason is not True), True)


def _unfit_for_pixels(
    models: Sequence[tuple[str, LoadedModel]],
    normalise: Normalisation,
    ladder: BatchBuckets | None,
    plan: Plan,
) -> str:
    """Why pixels cannot be left to all of `models`; "" if they can."""
    sizes = ladder.rungs if ladder is not None else {1, plan.max_rows}
    for _, model in models:
        if not isinstance(model, DeviceModel):
            return "its runtime cannot"
        if fault := try_pixels(model, normalise, sizes, padded=ladder is not None):
            return fault
    return ""


def _pixels(normalise: Normalisation | None, devices: Sequence[str], unfit: str) -> str | None:
    """Where pixels are normalised."""
    if normalise is None:
        return None
    return f"normalised on the CPU: {unfit}" if unfit else f"normalised on {', '.join(devices)}"


def _padding(plan: Plan, fault: str, padding: Padding | None) -> str:
    """Why batches are rounded up, or are not."""
    if fault:
        return f"batches run as they are: {fault}"
    if not plan.rungs:
        return "batches run as they are: rows share none"
    said = "batches are rounded up with rows of zeros, which changes no answer (tried on every size)"
    return f"{said}; so are lengths of texts" if padding is not None and padding.proven else said
