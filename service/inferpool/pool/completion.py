"""How entries end: each gets exactly one result, whether it ran, was dropped, or waits when the pool ends."""

from __future__ import annotations

from collections.abc import Callable

from inferpool.pool.batch import Batch, Outcome
from inferpool.pool.entry_queue import Drop, Queue
from inferpool.pool.ports import Entry, Result
from inferpool.pool.retries import Retries
from inferpool.pool.splitting import SplitRequest
from inferpool.pool.stats import DROPPED, BatchStats


class Completion:
    """Ends the entries of one pool, and knows which requests run in several slices.

    The caller holds the pool's lock.
    """

    def __init__(self, queue: Queue, retries: Retries, stats: BatchStats, clock: Callable[[], float]) -> None:
        """Entries that wait do so in `queue` or in `retries`; `stats` counts the entries that are dropped."""
        self._queue = queue
        self._retries = retries
        self._stats = stats
        self._clock = clock
        # By the id of the request's own entry; a request is in here until it has its result.
        self._splits: dict[int, SplitRequest] = {}

    def expect_slices(self, entry: Entry) -> None:
        """Take note that `entry`, which has just been queued, runs in slices or in parts."""
        self._splits[entry.id] = SplitRequest(entry)

    def split_of(self, entry: Entry) -> SplitRequest | None:
        """Return the split request that runs `entry`; None if the request has its result."""
        return self._splits.get(entry.part_of or entry.id)

    def end(
        self, outcome: Outcome, batch: Batch, compute_s: float, results: list[Result]
    ) -> SplitRequest | None:
        """Take the outcome of a slice; adds the result, if the entry has one now.

        Returns the split request whose last outcome this is, and whose outputs are to be joined.
        """
        row_slice = outcome.row_slice
        entry = row_slice.entry
        queue_s = batch.taken - entry.arrived
        if not row_slice.is_split:
            results.append(Result(entry.id, outcome.outputs, outcome.error, queue_s, compute_s, batch.rows))
            return None
        split = self.split_of(entry)
        if split is None or not split.add(outcome, queue_s, compute_s, batch.rows):
            return None
        del self._splits[split.entry.id]
        if split.error is None:
            return split
        self._remove_split(split)
        results.append(split.result())
        return None

    def run_undivided(self, entry: Entry) -> None:
        """Let `entry` run with all its rows at once, whatever of it has run in slices.

        Does nothing if it has its result, or is about to run so.
        """
        split = self._splits.pop(entry.id, None)
        if split is not None:
            self._remove_split(split)
            self._retries.add_undivided(entry, self._clock())

    def cancel(self, entry_id: int, reason: str) -> list[Result]:
        """Drop an entry if it, or a part of it, still waits; returns its result in that case."""
        split = self._splits.get(entry_id)
        entry = self._remove(entry_id) if split is None else self._remove_split(split)
        return self.drop([Drop(entry, reason)]) if entry is not None else []

    def drop(self, drops: list[Drop]) -> list[Result]:
        """Return the results of dropped entries; a split request is dropped with the first of its parts."""
        results: list[Result] = []
        now = self._clock()
        for entry, reason in drops:
            compute_s = 0.0
            split = self.split_of(entry)
            if split is not None:
                del self._splits[split.entry.id]
                self._remove_split(split)
                entry, compute_s = split.entry, split.compute_s
            elif entry.part_of:
                continue
            self._stats.count_drop(reason)
            results.append(Result(entry.id, None, DROPPED[reason](), now - entry.arrived, compute_s))
        return results

    def give_up(self, reason: str) -> list[Result]:
        """Answer everything that waits, because no instance is left to run it."""
        results: list[Result] = []
        for retry in self._retries.clear():
            self.end(Outcome(retry.slices[0], None, DROPPED[reason]()), retry, 0.0, results)
        return results + self.drop([Drop(entry, reason) for entry in self._queue.remove_all()])

    def _remove(self, entry_id: int) -> Entry | None:
        """Take out an entry that waits, for its first or second run; None if it does not wait."""
        waiting, retry = self._queue.remove(entry_id), self._retries.remove(entry_id)
        return waiting or retry

    def _remove_split(self, split: SplitRequest) -> Entry | None:
        """Take out everything of a split request that waits; returns its entry, or None if nothing waits."""
        removed = [self._remove(entry.id) for entry in split.queued_entries]
        return split.entry if any(entry is not None for entry in removed) else None
