"""Runs every bucket of a model on a GPU before it serves, and checks whether batches may be padded.

The runs also make the runtime choose its algorithms and grow its memory, so that no request waits for that.
"""

from __future__ import annotations

from collections.abc import Sequence

from inferpool.backends.base import DeviceModel
from inferpool.errors import OutOfMemory, Reason, short_reason
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.comparison import compare_outputs
from inferpool.repository.load.runnable_rows import find_runnable_rows, repeat_rows
from inferpool.tensors import Tensors


def warm_up(model: DeviceModel, buckets: BatchBuckets, samples: Sequence[Tensors]) -> Reason | None:
    """Run every bucket full and with its last row padded; returns why batches must not be padded.

    `samples` are inputs that the model is known to take. If the GPU has no memory for a bucket, half of it
    becomes the largest. Raises OutOfMemory if there is no memory for a single row.
    """
    rows, unrunnable = find_runnable_rows(model, samples)
    if unrunnable is not None:
        return f"no made-up rows could be run ({unrunnable})"
    # The largest bucket runs first: the others fit in the memory that the runtime takes for it.
    waiting = list(buckets.sizes)
    while waiting:
        bucket = waiting.pop()
        try:
            fault = _padding_fault(model, rows, bucket)
        except OutOfMemory:
            if not buckets.halve(bucket):
                raise
            waiting = list(buckets.sizes)
            continue
        except Exception as error:  # noqa: BLE001 - a row of zeros may be nonsense to the model
            fault = f"the model raised {short_reason(error)!r} on a row of zeros"
        if fault is not None:
            return fault
    return None


def _padding_fault(model: DeviceModel, rows: Tensors, bucket: int) -> Reason | None:
    """How a bucket with one row of padding differs from the same bucket full; None if it does not."""
    full = model.run_padded([repeat_rows(rows, bucket)], bucket)
    if bucket == 1:
        return None
    got = model.run_padded([repeat_rows(rows, bucket - 1)], bucket)
    fault, _ = compare_outputs(model.signature, got, full, range(bucket - 1), model.rounding)
    return None if fault is None else f"{fault} when a row of zeros is run with {bucket - 1} others"
