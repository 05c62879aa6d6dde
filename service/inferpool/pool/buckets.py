"""Batch sizes that repeat: on a GPU, a batch is padded to the next of a few sizes that were measured at load.

Nothing here is needed on the CPU, and nothing here imports a GPU library.

A runtime prepares itself for every shape that it meets (it picks algorithms and grows memory). A few sizes,
used again and again, therefore run at full speed. The padding is rows of zeros.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

from inferpool.backends.base import DeviceModel, LoadedModel, Rejection
from inferpool.errors import OutOfMemory, Reason
from inferpool.pool.batch import concatenate
from inferpool.pool.latency_model import Measurement
from inferpool.pool.padding import Padding
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

WORTH_A_BUCKET: Final = 0.95
"""A size is a bucket if it takes less than this share of the next bucket's time."""

STEEP: Final = 1.25
"""A size half-way between two is worth measuring if the larger takes this many times the smaller's time."""


class BatchBuckets:
    """The batch sizes of a version, shared by its instances. Running out of memory removes the largest ones.

    Any thread may do that at any moment.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes` has at least one size; they are at least 1 and rise."""
        self._sizes = tuple(sizes)
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes, rising."""
        return self._sizes

    @property
    def largest(self) -> int:
        """Rows of the largest batch."""
        return self._sizes[-1]

    def bucket_for(self, rows: int) -> int | None:
        """Return the next size at or above `rows`; None if `rows` is above the largest."""
        return next((size for size in self._sizes if size >= rows), None)

    def split(self, rows: int) -> list[int]:
        """Return `rows` rows as the rows of several runs: as many of `largest` as fit, and the rest."""
        largest = self.largest
        full, rest = divmod(rows, largest)
        return [largest] * full + [rest] * (rest > 0)

    def padded_rows(self, rows: int) -> int:
        """Return how many rows run in place of `rows`, including those that are padding."""
        sizes = self._sizes
        full, rest = divmod(rows, sizes[-1])
        return full * sizes[-1] + (sizes[bisect_left(sizes, rest)] if rest else 0)

    def halve(self, size: int) -> bool:
        """Make half of `size`, for which there was no memory, the largest; False if `size` is a single row.

        If several instances report the same size, the first report counts.
        """
        largest = size // 2
        with self._lock:
            if largest and self.largest > largest:
                self._sizes = (*(smaller for smaller in self._sizes if smaller < largest), largest)
        return largest > 0


def choose_buckets(table: Sequence[Measurement], max_rows: int) -> tuple[int, ...]:
    """Return the measured sizes up to `max_rows` that are worth a bucket; `max_rows` is always one.

    A size that takes almost as long as the next is left out, because padding to the next costs nothing.
    """
    kept: list[Measurement] = []
    for line in sorted(table, reverse=True):
        if line.rows > max_rows:
            continue
        if not kept or line.seconds < WORTH_A_BUCKET * kept[-1].seconds:
            kept.append(line)
    sizes = {int(line.rows) for line in kept} | {max_rows}
    return tuple(sorted(sizes))


def sizes_between(table: Sequence[Measurement]) -> list[int]:
    """Return the sizes half-way between two measured ones, if padding to the larger would cost much."""
    lines = sorted(table)
    return [
        int(low.rows + high.rows) // 2
        for low, high in pairwise(lines)
        if high.rows - low.rows > 1 and high.seconds > STEEP * low.seconds
    ]


class BucketedModel(LoadedModel):
    """A model on a GPU whose batches are padded to buckets. A batch that has no memory runs in halves.

    If `padding` says so, rows of tokens are padded to lengths that repeat, too.
    """

    def __init__(self, model: DeviceModel, buckets: BatchBuckets, padding: Padding | None = None) -> None:
        self.signature = model.signature
        self.form = model.form
        self.max_rows = model.max_rows
        self.cpu_nodes = model.cpu_nodes
        self.rounding = model.rounding
        self.buckets = buckets
        self._model = model
        self._padding = padding
        self._optional = frozenset(spec.name for spec in model.signature.inputs if spec.optional)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run rows in the bucket for them; raises whatever the model raises."""
        return self.run_parts([inputs], outputs)

    def run_parts(self, parts: Sequence[Tensors], outputs: Sequence[str] | None = None) -> Tensors:
        """Run the rows of all parts together, concatenated, as `run` does.

        Rows of tokens must all have one length.
        """
        padding = self._padding
        if padding is not None:
            length = padding.length(parts[0])
            if padding.run_length(length) > length and padding.may_grow(parts):
                return padding.cut(self._run_rows([padding.gather(parts)], outputs), length)
        return self._run_rows(parts, outputs)

    def _run_rows(self, parts: Sequence[Tensors], outputs: Sequence[str] | None) -> Tensors:
        rows = sum(map(_rows, parts))
        if not rows or not self._optional.isdisjoint(parts[0]):
            # An input that holds for the whole run has no rows that padding could be added to.
            return self._model.run(parts[0], outputs)
        while (bucket := self.buckets.bucket_for(rows)) is not None:
            try:
                return self._model.run_padded(parts, bucket, outputs)
            except OutOfMemory as error:
                if not self.buckets.halve(bucket):
                    raise
                text = "the GPU has no memory for %d rows, batches have at most %d from here on: %s"
                log.warning(text, bucket, self.buckets.largest, error)
        bounds = list(accumulate(self.buckets.split(rows), initial=0))
        return concatenate(
            [self._run_rows(_rows_between(parts, *ends), outputs) for ends in pairwise(bounds)]
        )

    def rejection(self, error: Exception) -> Rejection | None:
        """Why the input is to blame for `error`; None if it is not known to be."""
        return self._model.rejection(error)

    def stop_run(self, thread: int) -> None:
        """Ask the run of a thread to end."""
        self._model.stop_run(thread)

    def lost(self) -> Reason | None:
        """Why this process cannot use the device any more; None if it can."""
        return self._model.lost()

    def begin(self) -> None:
        """Get the model ready on the calling thread."""
        self._model.begin()

    def close(self) -> None:
        """Give back the model's memory."""
        self._model.close()

    def release_memory(self) -> None:
        """Free what the model's runtime keeps for later runs."""
        self._model.release_memory()


def _rows(part: Tensors) -> int:
    return len(next(iter(part.values())))


def _rows_between(parts: Sequence[Tensors], start: int, stop: int) -> list[Tensors]:
    """Return the rows `start` to `stop` of the concatenated parts, as views."""
    chosen = []
    for part in parts:
        rows = _rows(part)
        low, high = max(start, 0), min(stop, rows)
        if low < high:
            chosen.append({name: tensor[low:high] for name, tensor in part.items()})
        start, stop = start - rows, stop - rows
    return chosen
