"""What a version's pool has run and dropped, by batch size and in metrics."""

from __future__ import annotations

from typing import Final, NamedTuple

from inferpool.observe.metrics import Metrics
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.drop_reasons import DROPPED
from inferpool.pool.instance import Batch
from inferpool.pool.padding import Padding
from inferpool.pool.ports import VersionKey

_ENDS: Final = ("drained", "full", "deadline", "piece", "retry")
"""Why batches are no larger."""


class BatchCount(NamedTuple):
    """Batches of exactly `rows` rows: `runs` of them, `compute_s` seconds in all."""

    rows: int
    runs: int
    compute_s: float


class Counts:
    """The counts of one version. Its pool's lock is held by whoever calls."""

    def __init__(
        self, metrics: Metrics, key: VersionKey, padding: Padding | None, ladder: BatchBuckets | None
    ) -> None:
        """`padding` is how rows of different lengths are treated, `ladder` has the batch sizes of GPUs."""
        self._metrics = metrics
        self._labels = (key.model, str(key.version))
        self._padding = padding
        self._ladder = ladder
        self._rows_run = metrics.distribution("batch_rows", *self._labels)
        self._drops = {
            reason: metrics.value("dropped_entries_total", *self._labels, reason) for reason in DROPPED
        }
        self._batches: dict[int, BatchCount] = {}
        # A rate would miss the first batch of a series that begins with it; below as well.
        for name in ("tokens_total", "padded_tokens_total") if padding is not None else ():
            metrics.value(name, *self._labels)

    def add_device(self, device: str) -> None:
        """An instance on `device` is about to start."""
        for reason in _ENDS:
            self._metrics.value("batches_total", *self._labels, device, reason)
        self._metrics.value("instance_busy_seconds_total", *self._labels, device)
        if self._ladder is not None:
            self._metrics.value("padded_rows_total", *self._labels)

    def dropped(self, reason: str) -> None:
        """An entry has been dropped."""
        self._drops[reason].add()

    def ran(self, device: str, batch: Batch, compute_s: float) -> None:
        """A batch has run on `device` for so many seconds."""
        known = self._batches.get(batch.rows, BatchCount(batch.rows, 0, 0.0))
        self._batches[batch.rows] = BatchCount(batch.rows, known.runs + 1, known.compute_s + compute_s)
        self._rows_run.observe(batch.rows)
        self._metrics.value("batches_total", *self._labels, device, batch.reason).add()
        self._metrics.value("instance_busy_seconds_total", *self._labels, device).add(compute_s)
        if self._padding is not None:
            tokens, empty = _tokens(batch, self._padding)
            self._metrics.value("tokens_total", *self._labels).add(tokens)
            self._metrics.value("padded_tokens_total", *self._labels).add(empty)
        if self._ladder is not None:
            padded = self._ladder.padded(batch.rows) - batch.rows
            self._metrics.value("padded_rows_total", *self._labels).add(padded)

    def batches(self) -> list[BatchCount]:
        """What has run, by batch size, smallest first."""
        return sorted(self._batches.values())


def _tokens(batch: Batch, padding: Padding) -> tuple[int, int]:
    """Tokens that the batch has in all, and those of them that stand for nothing."""
    lengths = [padding.length(piece.entry.inputs) for piece in batch.pieces]
    ran = padding.run_length(max(lengths)) * sum(piece.rows for piece in batch.pieces)
    own = sum(piece.rows * length for piece, length in zip(batch.pieces, lengths, strict=True))
    return ran, ran - own
