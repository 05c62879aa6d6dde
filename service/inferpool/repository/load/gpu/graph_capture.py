"""CUDA graphs of a model on a GPU: captured on the thread that will run it, one for each rung of its ladder.

A runtime that keeps graphs apart by thread captures them here, before the instance's first batch. Each is
held against the same run as it was before, for rows that it was captured with and for others; if one fails,
none are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from inferpool.backends.base import DeviceModel
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.batching_check import compare, first_line, runnable
from inferpool.repository.load.planner import rows_of
from inferpool.tensors import ANY, Tensors, TensorSpec

log = logging.getLogger(__name__)

MOST_GRAPHS: Final = 32
"""Graphs of one instance, for each takes memory and time; of more shapes the smallest, which gain most."""


def capture(
    model: DeviceModel,
    ladder: BatchBuckets | None,
    samples: Sequence[Tensors],
    clock: Callable[[], float],
    texts: Sequence[Tensors] = (),
) -> None:
    """Capture what can be; `model.graphs` says what became of it. Raises only where no plain run is left.

    `samples` are inputs that the model is known to take; without a ladder it is captured for one of them, or
    for a row that is made up. `texts` are rows of each length that runs have, where these are rows of tokens.
    """
    shapes: list[tuple[int, Tensors]] = []
    try:
        fault = ""
        if ladder is None:
            fault = _capture_one(model, samples, clock)
        else:
            shapes, fault = _shapes(model, ladder, samples, clock, texts)
            # The largest first: what it makes room for, the others fit in.
            for rung, rows in reversed(shapes[:MOST_GRAPHS]):
                fault = fault or _alike(model, rung, rows_of(rows, rung), rows_of(_turned(rows), rung))
    except Exception as error:  # noqa: BLE001 - a model may do anything that cannot be captured
        fault = f"a run could not be captured: {first_line(error)}"
    # The error is gone by now, and with it what it held of the runs that are dropped here.
    if fault:
        log.warning("runs are not replayed from CUDA graphs: %s", fault)
        model.uncapture(fault)
    elif len(shapes) > MOST_GRAPHS:
        model.graphs = f"for the smallest {MOST_GRAPHS} of {len(shapes)} shapes that batches have"
    elif not texts and any(_varies(spec, ladder) for spec in model.signature.inputs):
        model.graphs = "for rows of the shape that was tried at load only"


def _capture_one(model: DeviceModel, samples: Sequence[Tensors], clock: Callable[[], float]) -> str:
    """Capture the run of a sample, or else of a row; what is wrong, "" if nothing is."""
    if samples:
        return _alike(model, None, samples[0], samples[0])
    rows, _, fault = runnable(model, samples, clock)
    if not rows:
        return f"no made-up rows could be run ({fault})"
    return _alike(model, None, rows_of(rows, 1), rows_of(_turned(rows), 1))


def _shapes(
    model: DeviceModel,
    ladder: BatchBuckets,
    samples: Sequence[Tensors],
    clock: Callable[[], float],
    texts: Sequence[Tensors],
) -> tuple[list[tuple[int, Tensors]], str]:
    """Every size of a batch, with rows for it, the smallest first; or what is wrong, "" if nothing is."""
    if texts:
        kinds = list(texts)
    else:
        rows, _, fault = runnable(model, samples, clock)
        if not rows:
            return [], f"no made-up rows could be run ({fault})"
        kinds = [rows]
    found = [(rung, rows) for rows in kinds for rung in ladder.rungs]
    return sorted(found, key=lambda shape: shape[0] * _row_bytes(shape[1])), ""


def _row_bytes(rows: Tensors) -> float:
    return sum(tensor.nbytes / len(tensor) for tensor in rows.values())


def _turned(rows: Tensors) -> Tensors:
    """The rows from the last to the first."""
    return {name: tensor[::-1] for name, tensor in rows.items()}


def _varies(spec: TensorSpec, ladder: BatchBuckets | None) -> bool:
    """Whether an input may have a shape for which no run was captured."""
    return spec.shape is None or ANY in (spec.shape if ladder is None else spec.shape[1:])


def _alike(model: DeviceModel, rung: int | None, batch: Tensors, other: Tensors) -> str:
    """Capture a run of `batch`, and hold the graph against plain runs, for `other` rows too."""

    def run(rows: Tensors) -> Tensors:
        return model.run(rows) if rung is None else model.run_padded([rows], rung)

    plain = run(other), run(batch)
    captured = model.capture([batch], rung)
    for got, want in zip((run(other), captured), plain, strict=True):
        count = len(next(iter(want.values()), ()))
        fault, _ = compare(model.signature, got, want, range(count), model.rounding)
        if fault:
            return f"{fault} when a run{f' of {rung} rows' if rung else ''} is replayed"
    return ""
