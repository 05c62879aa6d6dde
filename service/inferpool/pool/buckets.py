"""Batch sizes that repeat: on a GPU a batch is rounded up to a rung of a ladder that was measured at load.

Pure policy, and the model that follows it. A runtime prepares itself for every shape it meets (it picks
algorithms, grows memory), so that a few sizes, met again and again, run at full speed. The rows that are
missing to a rung are zeros.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

from inferpool.backends.base import DeviceModel, LoadedModel
from inferpool.errors import OutOfMemory
from inferpool.pool.batch import join
from inferpool.pool.latency_model import Measurement
from inferpool.pool.padding import Padding
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

WORTH: Final = 0.95
"""A rung stays where it takes less than this share of the next one's time; else that serves as well."""

STEEP: Final = 1.25
"""Half-way between two rungs there is another where the upper takes this many times the lower's time."""


class BatchBuckets:
    """The batch sizes of a version, shared by its instances: it only ever gets shorter, when memory does.

    That may happen in another thread at any moment.
    """

    def __init__(self, rungs: Sequence[int]) -> None:
        """`rungs` are at least one, at least 1 each, rising."""
        self._rungs = tuple(rungs)
        self._lock = threading.Lock()

    @property
    def rungs(self) -> tuple[int, ...]:
        """The batch sizes, rising."""
        return self._rungs

    @property
    def top(self) -> int:
        """The largest batch."""
        return self._rungs[-1]

    def up(self, rows: int) -> int | None:
        """The rung that `rows` rows run on: the next at or above them; None where they are too many."""
        return next((rung for rung in self._rungs if rung >= rows), None)

    def pieces(self, rows: int) -> list[int]:
        """`rows` rows as runs that the ladder has: as many of `top` as fit, and the rest."""
        top = self.top
        full, rest = divmod(rows, top)
        return [top] * full + [rest] * (rest > 0)

    def padded(self, rows: int) -> int:
        """How many rows run for `rows` rows: with those of zeros that they are rounded up with."""
        rungs = self._rungs
        full, rest = divmod(rows, rungs[-1])
        return full * rungs[-1] + (rungs[bisect_left(rungs, rest)] if rest else 0)

    def halve(self, rung: int) -> bool:
        """Let half of `rung`, which has failed, be the most from here on; False where it cannot be halved.

        Several instances may fail on it before the first has said so; that counts once.
        """
        most = rung // 2
        with self._lock:
            if most and self.top > most:
                self._rungs = (*(smaller for smaller in self._rungs if smaller < most), most)
        return most > 0


def rungs(table: Sequence[Measurement], most: int) -> tuple[int, ...]:
    """The rungs worth having of those that were measured, up to `most` rows, which is always one.

    A size that takes almost as long as the next is left out: padding up to that costs nothing.
    """
    kept: list[Measurement] = []
    for line in sorted(table, reverse=True):
        if line.rows > most:
            continue
        if not kept or line.seconds < WORTH * kept[-1].seconds:
            kept.append(line)
    sizes = {int(line.rows) for line in kept} | {most}
    return tuple(sorted(sizes))


def between(table: Sequence[Measurement]) -> list[int]:
    """Sizes half-way between two that were measured, where padding up to the upper would be dear."""
    lines = sorted(table)
    return [
        int(low.rows + high.rows) // 2
        for low, high in pairwise(lines)
        if high.rows - low.rows > 1 and high.seconds > STEEP * low.seconds
    ]


class BucketedModel(LoadedModel):
    """A model on a GPU, run on the rungs of a ladder; of a batch that is too large for memory, the halves.

    Rows of tokens are filled up to lengths that repeat, too, where `padding` says so.
    """

    def __init__(self, model: DeviceModel, ladder: BatchBuckets, padding: Padding | None = None) -> None:
        self.signature = model.signature
        self.form = model.form
        self.max_rows = model.max_rows
        self.cpu_nodes = model.cpu_nodes
        self.rounding = model.rounding
        self.ladder = ladder
        self._model = model
        self._padding = padding
        self._optional = frozenset(spec.name for spec in model.signature.inputs if spec.optional)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run rows on the rung above them; raises what the model raises."""
        return self.run_parts([inputs], outputs)

    def run_parts(self, parts: Sequence[Tensors], outputs: Sequence[str] | None = None) -> Tensors:
        """Run the rows of all parts together, one below the other, as `run` does with one.

        Rows of tokens have one length.
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
            # An input that holds for the whole run has no rows that could be added to.
            return self._model.run(parts[0], outputs)
        while (rung := self.ladder.up(rows)) is not None:
            try:
                return self._model.run_padded(parts, rung, outputs)
            except OutOfMemory as error:
                if not self.ladder.halve(rung):
                    raise
                text = "the GPU has no memory for %d rows, %d are the most from here on: %s"
                log.warning(text, rung, self.ladder.top, error)
        sizes = list(accumulate(self.ladder.pieces(rows), initial=0))
        return join([self._run_rows(_rows_between(parts, *ends), outputs) for ends in pairwise(sizes)])

    def begin(self) -> None:
        """Get the model ready on this thread."""
        self._model.begin()

    def close(self) -> None:
        """Give back memory."""
        self._model.close()


def _rows(part: Tensors) -> int:
    return len(next(iter(part.values())))


def _rows_between(parts: Sequence[Tensors], start: int, stop: int) -> list[Tensors]:
    """The rows `start` to `stop` of all parts, as views."""
    chosen = []
    for part in parts:
        rows = _rows(part)
        low, high = max(start, 0), min(stop, rows)
        if low < high:
            chosen.append({name: tensor[low:high] for name, tensor in part.items()})
        start, stop = start - rows, stop - rows
    return chosen
