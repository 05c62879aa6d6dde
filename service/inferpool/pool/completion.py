"""How entries end: each gets exactly one result, whether it ran, was dropped, or waits when the pool ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from inferpool.errors import DeadlineExceeded, InferpoolError, RunTimeout
from inferpool.pool.batch import PARTED, TIMED_OUT, Batch, Outcome, RowSlice, Run
from inferpool.pool.entry_queue import Drop, Queue
from inferpool.pool.ports import Entry, Result
from inferpool.pool.retries import Retries
from inferpool.pool.splitting import SplitRequest
from inferpool.pool.stats import DROPPED, RUN_OVER, BatchStats

LeaveRuns: TypeAlias = Callable[[int], list[tuple[RowSlice, Batch]]]
"""Tells the batches that run rows of a request that nobody waits for these any more.

Takes the id of the request's own entry, and returns each slice of it that runs, with its batch.
"""


class Completion:
    """Ends the entries of one pool, and knows which requests run in several slices.

    The caller holds the pool's lock.
    """

    def __init__(
        self,
        queue: Queue,
        retries: Retries,
        stats: BatchStats,
        clock: Callable[[], float],
        leave_runs: LeaveRuns,
    ) -> None:
        """Entries that wait do so in `queue` or in `retries`; `stats` counts the entries that are dropped."""
        self._leave_runs = leave_runs
        # By the id of a request that has its result: how many slices of it still run.
        self._readers: dict[int, int] = {}
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
            # A retry may have left a run behind that hangs, or that ran only some of the rows.
            runs_on = batch.reason == "retry" and self._leave(entry.id)
            results.append(
                Result(entry.id, outcome.outputs, outcome.error, queue_s, compute_s, batch.rows, runs_on)
            )
            return None
        split = self.split_of(entry)
        if split is None or not split.add(outcome, queue_s, compute_s, batch.rows):
            return None
        del self._splits[split.entry.id]
        if split.error is None:
            return split
        self._remove_split(split)
        result = split.result()
        result.runs_on = self._leave(split.entry.id)
        results.append(result)
        return None

    def time_out(self, row_slice: RowSlice, batch: Batch, results: list[Result]) -> None:
        """Answer the request of a slice whose run, alone, took longer than it may."""
        entry = row_slice.entry
        compute_s = self._clock() - batch.taken
        split = self.split_of(entry)
        if split is not None:
            del self._splits[split.entry.id]
            self._remove_split(split)
            entry, compute_s = split.entry, split.compute_s + compute_s
        elif row_slice.is_split:
            return  # the request has its result
        error = RunTimeout(
            f"the model ran this request for {compute_s:.0f} s, which is longer than it may; send less"
        )
        queue_s = batch.taken - entry.arrived
        runs_on = self._leave(entry.id)
        results.append(Result(entry.id, None, error, queue_s, compute_s, batch.rows, runs_on))

    def sort_out(self, batch: Batch, run: Run, results: list[Result]) -> list[Outcome]:
        """Return the outcomes of a run during which requests were answered, or which was stopped.

        Outcomes for which nobody waits are left out. After a timeout, or if the batch was parted, slices that
        did not run to their end run once more, each alone, because one of them may have held up all others. A
        slice that was alone gets RunTimeout, unless it only lets others run first.
        """
        answered = batch.answered or ()
        outcomes = [each for each in run.outcomes if each.row_slice.entry.id not in answered]
        if batch.stopped in (TIMED_OUT, PARTED):
            rows = dict.fromkeys((entry.id for entry in run.undivided), math.inf)
            for outcome in outcomes:
                ran = outcome.row_slice.rows if outcome.error is None else math.inf
                entry_id = outcome.row_slice.entry.id
                rows[entry_id] = rows.get(entry_id, 0) + ran
            for row_slice in batch.waiting_slices():
                ran = rows.get(row_slice.entry.id, 0)
                if ran < row_slice.rows:
                    self.retry_timed_out(row_slice, batch, results, again=not ran)
        return outcomes

    def retry_timed_out(
        self, row_slice: RowSlice, batch: Batch, results: list[Result], *, again: bool = True
    ) -> None:
        """Let a slice of a batch that took too long run again, alone; answer it if it ran alone.

        With `again` false, some of its rows have run, and it is answered in any case.
        """
        if again and (len(batch.slices) > 1 or batch.stopped == PARTED):
            self._retries.add_slice(row_slice, batch, self._clock())
        else:
            self.time_out(row_slice, batch, results)

    def end_reading(self, batch: Batch) -> list[int]:
        """Take note that a batch runs no more; returns the requests whose inputs nobody reads now.

        These are among those whose result said `runs_on`.
        """
        over: list[int] = []
        if self._readers and batch.answered is not None:
            for row_slice in batch.slices:
                entry = row_slice.entry
                request_id = entry.part_of or entry.id
                if entry.id in batch.answered and request_id in self._readers:
                    self._readers[request_id] -= 1
                    if not self._readers[request_id]:
                        del self._readers[request_id]
                        over.append(request_id)
        return over

    def _leave(self, request_id: int) -> bool:
        """Take note that a request has its result; returns whether a run still reads its inputs."""
        running = self._leave_runs(request_id)
        if running:
            self._readers[request_id] = len(running)
        return bool(running)

    def run_undivided(self, entry: Entry) -> None:
        """Let `entry` run with all its rows at once, whatever of it has run in slices.

        Does nothing if it has its result, or is about to run so.
        """
        split = self._splits.pop(entry.id, None)
        if split is not None:
            self._remove_split(split)
            self._retries.add_undivided(entry, self._clock())

    def cancel(self, entry_id: int, reason: str) -> list[Result]:
        """Drop an entry that waits or runs; returns its result, unless it has it already."""
        split = self._splits.get(entry_id)
        if split is not None:
            return self.drop([Drop(split.entry, reason)])
        entry = self._remove(entry_id)
        if entry is not None:
            return self.drop([Drop(entry, reason)])
        if entry_id in self._readers:
            return []
        running = self._leave_runs(entry_id)
        if not running:
            return []
        self._readers[entry_id] = len(running)
        self._stats.count_drop(reason)
        row_slice, batch = running[0]
        queue_s = batch.taken - row_slice.entry.arrived
        compute_s = self._clock() - batch.taken
        return [Result(entry_id, None, _run_over(reason), queue_s, compute_s, batch.rows, True)]

    def drop(self, drops: list[Drop]) -> list[Result]:
        """Return the results of dropped entries; a split request is dropped with the first of its parts."""
        results: list[Result] = []
        now = self._clock()
        for entry, reason in drops:
            compute_s = 0.0
            runs_on = False
            split = self.split_of(entry)
            if split is not None:
                del self._splits[split.entry.id]
                self._remove_split(split)
                entry, compute_s = split.entry, split.compute_s
                runs_on = self._leave(entry.id)
            elif entry.part_of:
                continue
            self._stats.count_drop(reason)
            error = _run_over(reason) if runs_on else DROPPED[reason]()
            results.append(Result(entry.id, None, error, now - entry.arrived, compute_s, 0, runs_on))
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


def _run_over(reason: str) -> InferpoolError:
    """The error of an entry that is dropped although it runs."""
    return DeadlineExceeded(RUN_OVER) if reason == "deadline" else DROPPED[reason]()
