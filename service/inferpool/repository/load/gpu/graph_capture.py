"""Captures CUDA graphs of a model on a GPU: one for each bucket, on the thread that will run the model.

A runtime that keeps graphs apart by thread captures here, before the instance's first batch. Each graph is
compared with the same run without a graph, for the rows that were captured and for others. If one differs,
the model uses no graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from inferpool.backends.base import DeviceModel, Rejection
from inferpool.errors import Reason, Verdict, short_reason
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.comparison import compare_outputs
from inferpool.repository.load.runnable_rows import find_runnable_rows, repeat_rows, reversed_rows
from inferpool.tensors import ANY, Tensors, TensorSpec

log = logging.getLogger(__name__)

MOST_GRAPHS: Final = 32
"""The most graphs of one instance, because each takes memory and time. The smallest shapes gain most."""


class CapturingModel(DeviceModel):
    """A model that captures its CUDA graphs on the thread of its instance, before the first batch."""

    def __init__(
        self,
        model: DeviceModel,
        buckets: BatchBuckets | None,
        samples: Sequence[Tensors],
        texts: Sequence[Tensors] = (),
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Run `model`; the other arguments are those of `capture`. `then` is called after each capture."""
        self.signature = model.signature
        self.form = model.form
        self.max_rows = model.max_rows
        self.cpu_nodes = model.cpu_nodes
        self.rounding = model.rounding
        self.can_capture = model.can_capture
        self._model = model
        self._buckets = buckets
        self._samples = samples
        self._texts = texts
        self._then = then

    @property
    def graphs(self) -> Verdict:  # type: ignore[override]
        """Whether runs are replayed from CUDA graphs, or why not."""
        return self._model.graphs

    @property
    def takes_pixels(self) -> Verdict:  # type: ignore[override]
        """Whether an input may come as pixels, or why not."""
        return self._model.takes_pixels

    def begin(self) -> None:
        """Prepare the calling thread, and capture on it."""
        self._model.begin()
        try:
            capture(self._model, self._buckets, self._samples, self._texts)
        finally:
            self._then()

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the model; raises what it raises."""
        return self._model.run(inputs, outputs)

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Run the rows of all `parts` among `rows`; raises what the model raises."""
        return self._model.run_padded(parts, rows, outputs)

    def rejection(self, error: Exception) -> Rejection | None:
        """Why the input is to blame for `error`; None if it is not known to be."""
        return self._model.rejection(error)

    def stop_run(self, thread: int) -> None:
        """Ask the run of a thread to end."""
        self._model.stop_run(thread)

    def lost(self) -> Reason | None:
        """Why this process cannot use the device any more; None if it can."""
        return self._model.lost()

    def close(self) -> None:
        """Close the model."""
        self._model.close()


def capture(
    model: DeviceModel,
    buckets: BatchBuckets | None,
    samples: Sequence[Tensors],
    texts: Sequence[Tensors] = (),
) -> None:
    """Capture all runs that can be captured; `model.graphs` then says whether they are replayed.

    `samples` are inputs that the model is known to take. Without `buckets`, the run of one sample is
    captured, or of one made-up row. `texts` are rows of tokens of each length that runs have. Raises
    only if the model cannot even run without graphs.
    """
    shapes: list[tuple[int, Tensors]] = []
    try:
        if buckets is None:
            fault = _capture_one(model, samples)
        else:
            shapes, fault = _shapes(model, buckets, samples, texts)
            # The largest shape first: the others fit in the memory that the runtime takes for it.
            for bucket, rows in reversed(shapes[:MOST_GRAPHS]):
                fault = fault or _capture_and_compare(
                    model, bucket, repeat_rows(rows, bucket), repeat_rows(reversed_rows(rows), bucket)
                )
    except Exception as error:  # noqa: BLE001 - a model may do anything that cannot be captured
        fault = f"a run could not be captured: {short_reason(error)}"
    # `uncapture` comes after the handler: the error would keep the runs alive that are dropped here.
    if fault is not None:
        log.warning("runs are not replayed from CUDA graphs: %s", fault)
        model.uncapture(fault)
    elif len(shapes) > MOST_GRAPHS:
        reason = f"for the smallest {MOST_GRAPHS} of {len(shapes)} shapes that batches have"
        model.graphs = Verdict(False, reason)
    elif not texts and any(_varies(spec, buckets) for spec in model.signature.inputs):
        model.graphs = Verdict(False, "for rows of the shape that was tried at load only")


def _capture_one(model: DeviceModel, samples: Sequence[Tensors]) -> Reason | None:
    """Capture the run of a sample, or of a made-up row; returns what is wrong."""
    if samples:
        return _capture_and_compare(model, None, samples[0], samples[0])
    rows, unrunnable = find_runnable_rows(model, samples)
    if unrunnable is not None:
        return f"no made-up rows could be run ({unrunnable})"
    return _capture_and_compare(model, None, repeat_rows(rows, 1), repeat_rows(reversed_rows(rows), 1))


def _shapes(
    model: DeviceModel,
    buckets: BatchBuckets,
    samples: Sequence[Tensors],
    texts: Sequence[Tensors],
) -> tuple[list[tuple[int, Tensors]], Reason | None]:
    """Every shape of a batch as a bucket and rows for it, the smallest first; or what is wrong."""
    if texts:
        kinds = list(texts)
    else:
        rows, unrunnable = find_runnable_rows(model, samples)
        if unrunnable is not None:
            return [], f"no made-up rows could be run ({unrunnable})"
        kinds = [rows]
    found = [(bucket, rows) for rows in kinds for bucket in buckets.sizes]
    return sorted(found, key=lambda shape: shape[0] * _row_bytes(shape[1])), None


def _row_bytes(rows: Tensors) -> float:
    return sum(tensor.nbytes / len(tensor) for tensor in rows.values())


def _varies(spec: TensorSpec, buckets: BatchBuckets | None) -> bool:
    """Whether an input may have a shape for which no run was captured."""
    return spec.shape is None or ANY in (spec.shape if buckets is None else spec.shape[1:])


def _capture_and_compare(
    model: DeviceModel, bucket: int | None, batch: Tensors, other: Tensors
) -> Reason | None:
    """Capture a run of `batch`, and compare the graph with plain runs of `batch` and of `other` rows."""

    def run(rows: Tensors) -> Tensors:
        return model.run(rows) if bucket is None else model.run_padded([rows], bucket)

    plain = run(other), run(batch)
    captured = model.capture([batch], bucket)
    for got, want in zip((run(other), captured), plain, strict=True):
        count = len(next(iter(want.values()), ()))
        fault, _ = compare_outputs(model.signature, got, want, range(count), model.rounding)
        if fault is not None:
            return f"{fault} when a run{f' of {bucket} rows' if bucket else ''} is replayed"
    return None
