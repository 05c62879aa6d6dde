"""Batches of one entry that run once more.

The instance of the first run has died, or that run took too long, or the entry has run in slices and has to
run with all its rows at once.
"""

from __future__ import annotations

from collections import deque

from inferpool.errors import ModelFailed
from inferpool.pool.batch import Batch, Outcome, RowSlice
from inferpool.pool.ports import Entry
from inferpool.pool.stats import DROPPED


class Retries:
    """Batches of one slice that wait to run again. The caller holds the pool's lock."""

    def __init__(self) -> None:
        self._waiting: deque[Batch] = deque()
        # The slices that run for the second time: the entry's id and the first row.
        self._tried: set[tuple[int, int]] = set()
        # Those of them that run for the third time, because other slices waited for their second run to end.
        self._put_off: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, batch: Batch, now: float) -> list[Outcome]:
        """Let the slices of `batch` run again; returns the outcomes of those that do not.

        A slice ends here if this was its second run, or if its deadline has passed.
        """
        ended: list[Outcome] = []
        for row_slice in batch.waiting_slices():
            run = (row_slice.entry.id, row_slice.start)
            if run in self._tried:
                self._tried.discard(run)
                failure = ModelFailed("the model ended its instance on this request, twice")
                ended.append(Outcome(row_slice, None, failure))
            elif row_slice.entry.deadline <= now:
                ended.append(Outcome(row_slice, None, DROPPED["deadline"]()))
            else:
                self.add_slice(row_slice, batch, now)
        return ended

    def add_slice(self, row_slice: RowSlice, batch: Batch, now: float) -> None:
        """Let a slice of `batch` run again, alone."""
        run = (row_slice.entry.id, row_slice.start)
        self._tried.add(run)
        if batch.reason == "retry":
            self._put_off.add(run)
        self._waiting.append(Batch([row_slice], batch.batched, "retry", now, batch.padding))

    def add_undivided(self, entry: Entry, now: float) -> None:
        """Let all rows of `entry` run at once."""
        self._waiting.append(Batch([RowSlice(entry, 0, entry.rows)], False, "retry", now))

    def can_put_off(self, batch: Batch) -> bool:
        """Whether a batch that runs too long is a retry which should let others run first, once."""
        if batch.reason != "retry" or not self._waiting:
            return False
        return (batch.slices[0].entry.id, batch.slices[0].start) not in self._put_off

    def take(self) -> Batch | None:
        """Return the batch that has waited longest; None if none waits."""
        return self._waiting.popleft() if self._waiting else None

    def forget(self, batch: Batch) -> None:
        """Note that a batch has ended, whether it is a retry or not."""
        if self._tried:
            runs = [(each.entry.id, each.start) for each in batch.slices]
            self._tried.difference_update(runs)
            self._put_off.difference_update(runs)

    def remove(self, entry_id: int) -> Entry | None:
        """Take out every slice of an entry that waits here; returns the entry, or None if no slice waits."""
        removed = None
        for batch in list(self._waiting):
            if batch.slices[0].entry.id == entry_id:
                self._waiting.remove(batch)
                self.forget(batch)
                removed = batch.slices[0].entry
        return removed

    def clear(self) -> list[Batch]:
        """Take out everything that waits."""
        waiting = list(self._waiting)
        self._waiting.clear()
        self._tried.clear()
        self._put_off.clear()
        return waiting
