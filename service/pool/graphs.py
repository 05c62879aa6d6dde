"""CUDA graphs of a model on a GPU: captured on the thread that will run it, one for each rung of its ladder.

A runtime that keeps graphs apart by thread captures them here, before the instance's first batch. Each is
held against the same run as it was before, for rows that it was captured with and for others; if one fails,
none are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from service.backends.base import DeviceModel
from service.pool.ladder import Ladder
from service.pool.plan import rows_of
from service.pool.proof import compare, first_line, runnable
from service.tensors import ANY, Tensors, TensorSpec

log = logging.getLogger(__name__)

MOST_GRAPHS: Final = 16
"""Graphs of one instance, for each takes memory; of a longer ladder the lowest rungs, which gain most."""


def capture(
    model: DeviceModel, ladder: Ladder | None, samples: Sequence[Tensors], clock: Callable[[], float]
) -> None:
    """Capture what can be; `model.graphs` says what became of it. Raises only where no plain run is left.

    `samples` are inputs that the model is known to take; without a ladder it is captured for one of them, or
    for a row that is made up.
    """
    try:
        fault = _capture(model, ladder, samples, clock)
    except Exception as error:  # noqa: BLE001 - a model may do anything that cannot be captured
        fault = f"a run could not be captured: {first_line(error)}"
    # The error is gone by now, and with it what it held of the runs that are dropped here.
    if fault:
        log.warning("runs are not replayed from CUDA graphs: %s", fault)
        model.uncapture(fault)
    elif any(_varies(spec, ladder) for spec in model.signature.inputs):
        model.graphs = "for rows of the shape that was tried at load only"


def _capture(
    model: DeviceModel, ladder: Ladder | None, samples: Sequence[Tensors], clock: Callable[[], float]
) -> str:
    """Capture; what is wrong, "" if nothing is."""
    if ladder is None and samples:
        return _alike(model, None, samples[0], samples[0])
    rows, _, fault = runnable(model, samples, clock)
    if not rows:
        return f"no made-up rows could be run ({fault})"
    others = {name: tensor[::-1] for name, tensor in rows.items()}
    if ladder is None:
        return _alike(model, None, rows_of(rows, 1), rows_of(others, 1))
    # The largest first: what it makes room for, the others fit in.
    for rung in reversed(ladder.rungs[:MOST_GRAPHS]):
        if fault := _alike(model, rung, rows_of(rows, rung), rows_of(others, rung)):
            return fault
    return ""


def _varies(spec: TensorSpec, ladder: Ladder | None) -> bool:
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
