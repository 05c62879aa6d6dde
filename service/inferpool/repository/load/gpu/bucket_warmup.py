"""What is found out of a model on a GPU before it serves: whether rows may be padded.

Each instance runs every rung of its ladder, which is also what makes the runtime pick its algorithms and grow
its memory, so that no request waits for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inferpool.backends.base import DeviceModel
from inferpool.errors import OutOfMemory
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.batching_check import compare, first_line, runnable
from inferpool.repository.load.planner import rows_of
from inferpool.tensors import Tensors


def warm_up(
    model: DeviceModel, ladder: BatchBuckets, samples: Sequence[Tensors], clock: Callable[[], float]
) -> str:
    """Run every rung full and with its last row padded; returns why padding must not be, "" if it may.

    `samples` are inputs that the model is known to take. A rung that the GPU has no memory for halves the
    ladder; raises OutOfMemory where there is none for a single row.
    """
    rows, _, fault = runnable(model, samples, clock)
    if not rows:
        return f"no made-up rows could be run ({fault})"
    # The largest first: what it makes room for, the others fit in.
    waiting = list(ladder.rungs)
    while waiting:
        rung = waiting.pop()
        try:
            fault = _padded(model, rows, rung)
        except OutOfMemory:
            if not ladder.halve(rung):
                raise
            waiting = list(ladder.rungs)
        except Exception as error:  # noqa: BLE001 - a row of zeros may be nonsense to the model
            fault = f"the model raised {first_line(error)!r} on a row of zeros"
        if fault:
            return fault
    return ""


def _padded(model: DeviceModel, rows: Tensors, rung: int) -> str:
    """Hold a rung with one row of padding against the same rung full; what is wrong, "" if nothing is."""
    full = model.run_padded([rows_of(rows, rung)], rung)
    if rung == 1:
        return ""
    got = model.run_padded([rows_of(rows, rung - 1)], rung)
    fault, _ = compare(model.signature, got, full, range(rung - 1), model.rounding)
    return f"{fault} when a row of zeros is run with {rung - 1} others" if fault else ""
