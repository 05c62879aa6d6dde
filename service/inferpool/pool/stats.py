"""The report of a pool: batches that ran, entries that were dropped, entries that wait, instances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from inferpool.errors import DeadlineExceeded, Draining, InferpoolError, NotReady, Reason
from inferpool.observe.families import BATCH_RUNS
from inferpool.observe.metrics import Metrics
from inferpool.pool.batch import Batch
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.padding import Padding
from inferpool.pool.ports import VersionKey

DROPPED: Final[dict[str, Callable[[], InferpoolError]]] = {
    "deadline": lambda: DeadlineExceeded("the deadline passed before the model could run"),
    "disconnected": lambda: InferpoolError("the client is gone"),
    "draining": lambda: Draining("the server is shutting down"),
    "lost": lambda: NotReady("every instance of this version is lost or hangs"),
}
"""Makes the error of a dropped entry; the keys are the reasons of `dropped_entries_total`."""

RUN_OVER: Final = "the deadline passed while the model ran"

_BATCH_REASONS: Final = ("drained", "full")
"""The usual reasons why a batch is no larger, whose counters exist from the start."""

STOPPED: Final = ("answer", "rows")
"""Why batching is turned off while serving: another answer than alone, or another number of rows."""


class BatchCount(NamedTuple):
    """Batches of exactly `rows` rows: how many ran, and for how many seconds in total."""

    rows: int
    runs: int
    compute_s: float


class Waiting(NamedTuple):
    """The entries that wait: rows, seconds that the oldest has waited, and seconds of work ahead."""

    rows: int = 0
    oldest_age_s: float = 0.0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class InstanceState:
    """An instance as seen from outside.

    Attributes:
        device: where it runs.
        state: `ready`, `lost` (its thread has ended) or `hung` (its run does not stop).
        run_s: seconds that the run of an instance that hangs has taken; 0 for others.
    """

    device: str
    state: str
    run_s: float = 0.0


def hung_reason(instances: Sequence[InstanceState]) -> Reason | None:
    """Say how many of the instances hang, and for how long; None if none does."""
    hung = [instance.run_s for instance in instances if instance.state == "hung"]
    if not hung:
        return None
    return f"{len(hung)} of {len(instances)} instances hang: a run has taken {max(hung):.0f} s"


class BatchStats:
    """The counts of one version. The caller holds the pool's lock."""

    def __init__(
        self,
        metrics: Metrics,
        key: VersionKey,
        padding: Padding | None,
        buckets: BatchBuckets | None,
        *,
        audited: bool,
    ) -> None:
        """`padding` tells how many tokens a row has; `buckets` has the batch sizes that GPUs run.

        `audited` tells whether requests of the version may be audited.
        """
        self._metrics = metrics
        self._labels = (key.model, str(key.version))
        self._padding = padding
        self._buckets = buckets
        self._batch_rows = metrics.distribution("batch_rows", *self._labels)
        self._batches: dict[int, BatchCount] = {}
        self._shared_batches: dict[int, memoryview[float] | None] = {}
        # Series start at 0 here and in `add_device`: a rate misses the batch with which a series begins.
        metrics.value("dropped_entries_total", *self._labels, "deadline")
        if audited:
            metrics.value("audits_total", *self._labels)
        for name in ("tokens_total", "padded_tokens_total") if padding is not None else ():
            metrics.value(name, *self._labels)

    def add_device(self, device: str) -> None:
        """Export the counters of `device`, on which an instance is about to start."""
        for reason in _BATCH_REASONS:
            self._metrics.value("batches_total", *self._labels, device, reason)
        self._metrics.value("instance_busy_seconds_total", *self._labels, device)
        if self._buckets is not None:
            self._metrics.value("padded_rows_total", *self._labels)

    def count_drop(self, reason: str) -> None:
        """Count an entry that was dropped."""
        self._metrics.value("dropped_entries_total", *self._labels, reason).add()

    def count_audit(self) -> None:
        """Count an entry that ran again, alone."""
        self._metrics.value("audits_total", *self._labels).add()

    def count_stop(self, reason: str) -> None:
        """Count that batching was turned off, for a reason of `STOPPED`."""
        self._metrics.value("batching_stopped_total", *self._labels, reason).add()

    def count_busy(self, device: str, seconds: float) -> None:
        """Count time that an instance on `device` has spent on a batch that still runs."""
        self._metrics.value("instance_busy_seconds_total", *self._labels, device).add(seconds)

    def count_batch(self, device: str, batch: Batch, compute_s: float, counted_s: float = 0.0) -> None:
        """Count a batch that ran on `device` for `compute_s`, of which `count_busy` knows `counted_s`."""
        known = self._batches.get(batch.rows)
        if known is None:
            known = self._first_count(batch.rows)
        counted = BatchCount(batch.rows, known.runs + 1, known.compute_s + compute_s)
        self._batches[batch.rows] = counted
        if self._metrics.is_shared:
            shared = self._shared_batches[batch.rows]
            if shared is not None:
                shared[0] = counted.runs
                shared[1] = counted.compute_s
        self._batch_rows.observe(batch.rows)
        self._metrics.value("batches_total", *self._labels, device, batch.reason).add()
        self._metrics.value("instance_busy_seconds_total", *self._labels, device).add(
            max(0.0, compute_s - counted_s)
        )
        if self._padding is not None:
            tokens, padded = _tokens(batch, self._padding)
            self._metrics.value("tokens_total", *self._labels).add(tokens)
            self._metrics.value("padded_tokens_total", *self._labels).add(padded)
        if self._buckets is not None:
            padded_rows = self._buckets.padded_rows(batch.rows) - batch.rows
            self._metrics.value("padded_rows_total", *self._labels).add(padded_rows)

    def _first_count(self, rows: int) -> BatchCount:
        """What a predecessor of this process has counted of batches of `rows` rows."""
        if not self._metrics.is_shared:
            return BatchCount(rows, 0, 0.0)
        shared = self._shared_batches[rows] = self._metrics.hidden(BATCH_RUNS, *self._labels, str(rows))
        return BatchCount(rows, 0, 0.0) if shared is None else BatchCount(rows, int(shared[0]), shared[1])

    def batches(self) -> list[BatchCount]:
        """Return what has run by batch size, smallest first."""
        return sorted(self._batches.values())


def _tokens(batch: Batch, padding: Padding) -> tuple[int, int]:
    """Return how many tokens ran in the batch, and how many of them were padding."""
    lengths = [padding.length(each.entry.inputs) for each in batch.slices]
    ran = padding.run_length(max(lengths)) * sum(each.rows for each in batch.slices)
    own = sum(each.rows * length for each, length in zip(batch.slices, lengths, strict=True))
    return ran, ran - own
