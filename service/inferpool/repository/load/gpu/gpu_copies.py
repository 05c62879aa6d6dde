"""The copies of a model on GPUs: one for each instance, tried on everything that it will run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inferpool.backends.base import REPLAYED, Backend, DeviceModel, LoadedModel, LoadOptions
from inferpool.errors import LoadError, OutOfMemory, Reason, Verdict
from inferpool.pixel_table import Normalisation
from inferpool.pool.buckets import BatchBuckets, BucketedModel
from inferpool.pool.hot_swap import HotSwapModel
from inferpool.pool.padding import Padding
from inferpool.repository.catalog import GpuView, RoundingDifference
from inferpool.repository.load.gpu.bucket_warmup import warm_up
from inferpool.repository.load.gpu.graph_capture import CapturingModel
from inferpool.repository.load.gpu.pixel_check import check_pixels
from inferpool.repository.load.gpu.precision import Reference, run_reference
from inferpool.repository.load.gpu.tensorrt_upgrade import FindFolder, TensorRTUpgrade
from inferpool.repository.load.model_copies import ModelCopies
from inferpool.repository.load.plan import Plan
from inferpool.repository.load.runnable_rows import find_runnable_rows, repeat_rows
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuInputs:
    """The inputs with which copies on GPUs are tried.

    Attributes:
        samples: inputs that the model is known to take.
        texts: rows of tokens of every length that runs have; empty if inputs are no tokens.
        padding: how rows of tokens are padded; None if inputs are no tokens.
    """

    samples: Sequence[Tensors]
    texts: Sequence[Tensors] = ()
    padding: Padding | None = None


class GpuCopies(ModelCopies):
    """The copies of one version on GPUs."""

    def __init__(self, backend: Backend, file: Path) -> None:
        super().__init__(backend, file)
        self._upgrade: TensorRTUpgrade | None = None
        self._captured: list[threading.Event] = []

    @property
    def tensorrt(self) -> str | None:
        """The state of the upgrade to TensorRT, as a sentence; None if none was asked for."""
        return None if self._upgrade is None else self._upgrade.status

    def prepare(
        self,
        devices: Sequence[str],
        plan: Plan,
        options: LoadOptions,
        inputs: GpuInputs,
        find_folder: FindFolder | None = None,
    ) -> None:
        """Load a copy for each instance on each of `devices`, and run every bucket; raises LoadError.

        `find_folder` says where a TensorRT plan is kept; None asks for none.
        """
        # Before anything else is on the card: in FP32 a model takes twice the memory of FP16.
        exact, unmeasured = self._run_exact(replace(options, device=devices[0]), inputs.samples)
        buckets = BatchBuckets(plan.buckets) if plan.buckets else None
        copies, fault = self._load_copies(devices, plan.instances, options, inputs.samples, buckets)
        if fault is None:
            self.buckets = buckets
        wanted, unfit = options.gpu.normalisation, None
        if wanted is not None:
            unfit = self._pixel_fault(copies, wanted, plan.max_rows)
            self.takes_pixels = unfit is None
            options = options.with_gpu(normalisation=wanted if unfit is None else None)
        served = self._wrap(copies, options, inputs, find_folder)
        self.models = list(zip((device for device, _ in copies), served, strict=True))
        rounding = _rounding(options)
        difference = exact.difference(served[0], rounding) if exact is not None else None
        self.gpu = GpuView(
            cpu_nodes=dict(served[0].cpu_nodes),
            padding=_padding_text(plan, fault, inputs.padding),
            precision=_precision_text(rounding, difference, unmeasured),
            difference=difference,
            graphs=_graphs(self._owned),
            pixels=_pixels_text(wanted, devices, unfit),
        )
        if self.gpu.cpu_nodes:
            log.warning("%s: nodes that run on the CPU: %s", self._file, self.gpu.cpu_nodes)

    def finish(self) -> None:
        """Wait until every instance has captured its graphs, and begin to build for TensorRT."""
        for captured in self._captured:
            captured.wait()
        if self._upgrade is not None:
            self._upgrade.start()
        if self.gpu is not None:
            self.gpu = replace(self.gpu, graphs=_graphs(self._owned))

    def await_upgrade(self, timeout_s: float) -> bool:
        """Wait until the upgrade to TensorRT has ended, if there is one; False after `timeout_s`."""
        return self._upgrade is None or self._upgrade.wait(timeout_s)

    def close(self) -> None:
        """Free all memory. No run is in progress and none follows."""
        if self._upgrade is not None:
            self._upgrade.close()
        super().close()

    def _load_copies(
        self,
        devices: Sequence[str],
        instances: int,
        options: LoadOptions,
        samples: Sequence[Tensors],
        buckets: BatchBuckets | None,
    ) -> tuple[list[tuple[str, LoadedModel]], Reason | None]:
        """The copies with their devices, and why batches must not be padded to buckets."""
        fault: Reason | None = None
        copies: list[tuple[str, LoadedModel]] = []
        for device in [device for device in devices for _ in range(instances)]:
            model = self.load(replace(options, device=device))
            copies.append((device, model))
            if buckets is None or not isinstance(model, DeviceModel):
                continue
            try:
                fault = fault or warm_up(model, buckets, samples)
            except OutOfMemory as error:
                raise LoadError(f"{device} has no memory for a single row: {error.detail}") from error
        return copies, fault

    def _wrap(
        self,
        copies: Sequence[tuple[str, LoadedModel]],
        options: LoadOptions,
        inputs: GpuInputs,
        find_folder: FindFolder | None,
    ) -> list[LoadedModel]:
        """The models that instances run: they capture, can be exchanged, and round batches up to buckets."""
        models: list[LoadedModel] = []
        for _, model in copies:
            if isinstance(model, DeviceModel) and options.gpu.graphs and model.can_capture:
                self._captured.append(threading.Event())
                models.append(
                    CapturingModel(
                        model,
                        self.buckets,
                        inputs.samples,
                        inputs.texts,
                        then=self._captured[-1].set,
                    )
                )
            else:
                models.append(model)
        if find_folder is not None:
            switches = [HotSwapModel(model) for model in models if isinstance(model, DeviceModel)]
            self._owned = [*switches]
            by_device = list(zip((device for device, _ in copies), switches, strict=True))
            self._begin_upgrade(by_device, options, inputs.samples, find_folder)
            models = [*switches]
        buckets = self.buckets
        if buckets is None:
            return models
        return [
            BucketedModel(model, buckets, inputs.padding) if isinstance(model, DeviceModel) else model
            for model in models
        ]

    def _begin_upgrade(
        self,
        switches: Sequence[tuple[str, HotSwapModel]],
        options: LoadOptions,
        samples: Sequence[Tensors],
        find_folder: FindFolder,
    ) -> None:
        rows = find_runnable_rows(switches[0][1], samples).rows
        if self.buckets is None:
            rows = samples[0] if samples else repeat_rows(rows, 1) if rows else {}
        self._upgrade = TensorRTUpgrade(
            self._backend, self._file, options, find_folder, self.buckets, rows, switches
        )

    def _run_exact(
        self, options: LoadOptions, samples: Sequence[Tensors]
    ) -> tuple[Reference | None, Reason | None]:
        """The model's outputs in FP32 if it is to serve with coarser rounding, or why there are none."""
        if not _rounding(options):
            return None, None
        try:
            model = self.load(options.with_gpu(tf32=False, fp16=False, graphs=False, normalisation=None))
        except LoadError as error:
            return None, error.detail
        try:
            found = run_reference(model, samples)
        except OutOfMemory as error:
            return None, error.detail
        finally:
            self.drop(model)
        return (found, None) if found.inputs else (None, "no rows could be run")

    def _pixel_fault(
        self, copies: Sequence[tuple[str, LoadedModel]], normalise: Normalisation, max_rows: int
    ) -> Reason | None:
        """Why the copies cannot normalise pixels; None if all of them can."""
        padded = self.buckets is not None
        sizes: Iterable[int] = self.buckets.sizes if self.buckets is not None else {1, max_rows}
        for _, model in copies:
            if not isinstance(model, DeviceModel):
                return "its runtime cannot"
            fault = check_pixels(model, normalise, sizes, padded=padded)
            if fault is not None:
                return fault
        return None


def _rounding(options: LoadOptions) -> str:
    """The rounding that the owner allows; empty if none."""
    if options.gpu.fp16:
        return "FP16, and TF32 in what stays FP32" if options.gpu.tf32 else "FP16"
    return "TF32" if options.gpu.tf32 else ""


def _precision_text(rounding: str, found: RoundingDifference | None, unmeasured: Reason | None) -> str:
    if not rounding:
        return "as the model says"
    if found is None:
        return f"{rounding}; how much that changes could not be measured: {unmeasured}"
    most = f"{found.relative:.1g} of their scale"
    return f"{rounding}; its outputs differ from those of FP32 by {most} at the most"


def _graphs(models: Sequence[LoadedModel]) -> Verdict:
    """Whether all models replay their runs from CUDA graphs, or why one of them does not."""
    verdicts = [model.graphs for model in models if isinstance(model, DeviceModel)]
    return next((verdict for verdict in verdicts if not verdict.ok), REPLAYED)


def _pixels_text(normalise: Normalisation | None, devices: Sequence[str], unfit: Reason | None) -> str | None:
    """Where pixels are normalised; None if the model takes no pictures."""
    if normalise is None:
        return None
    return f"normalised on {', '.join(devices)}" if unfit is None else f"normalised on the CPU: {unfit}"


def _padding_text(plan: Plan, fault: Reason | None, padding: Padding | None) -> str:
    """Why batches are rounded up to buckets, or are not."""
    if fault is not None:
        return f"batches run as they are: {fault}"
    if not plan.buckets:
        return "batches run as they are: rows share none"
    text = "batches are rounded up with rows of zeros, which changes no answer (tried on every size)"
    return f"{text}; so are lengths of texts" if padding is not None and padding.proven else text
