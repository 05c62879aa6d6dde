"""Which entries may wait: the bounds of a queue, and whether an entry can run before its deadline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from inferpool.errors import DeadlineExceeded, QueueFull
from inferpool.pool.fair_shares import FairShares
from inferpool.pool.ports import Entry
from inferpool.pool.waiting_entries import WaitingEntries

UNKNOWN_BATCH_S: Final = 1e-3
"""Seconds that a batch is expected to take while nothing has been measured."""
MAX_WAITING_ROWS: Final = 1_000_000


@dataclass(slots=True)
class Limits:
    """The bounds of a queue.

    Attributes:
        batch_rows: rows that a batch may have; 1 if the version is not batched.
        queue_rows: rows that may wait. Entries that fit in a batch and larger ones are bounded separately.
        queue_bytes: bytes of inputs that may wait.
        queue_s: seconds of work that may wait. `queue_rows` then follows the last measurements; with infinity
            it stays as it is.
        least_rows: rows that may wait however long they take, in addition to a batch for each instance.
        delay_s: seconds that a batch which is not full may wait, from the arrival of its first entry.
        batch_bytes: bytes of inputs that a batch of several entries may have. Rows of one size are bounded by
            `batch_rows` alone; a large row may take much memory though it costs little time.
    """

    batch_rows: int
    queue_rows: int
    queue_bytes: int
    queue_s: float = math.inf
    least_rows: int = 1
    delay_s: float = 0.0
    batch_bytes: float = math.inf

    @property
    def slice_rows(self) -> int:
        """Rows of a slice of an entry that is larger than a batch: half a batch."""
        return max(1, self.batch_rows // 2)

    def is_large(self, entry: Entry) -> bool:
        """Whether an entry is larger than a batch, so that it runs in slices."""
        return entry.rows > 1 and entry.load > self.batch_rows

    def is_costly(self, entry: Entry) -> bool:
        """Whether an entry costs more than a full batch, so that all that cost less go first."""
        return entry.load > self.batch_rows


class Admission:
    """Refuses entries that have no room in the queue, or that would run too late."""

    def __init__(
        self,
        limits: Limits,
        waiting: WaitingEntries,
        batch_s: Callable[[float], float],
        safety_factor: Callable[[], float],
    ) -> None:
        """`batch_s(rows)` is the expected seconds of a batch of so many rows, and 0 while nothing is known.

        The entries ahead of a new one are expected to take `safety_factor()` times that. In a full queue,
        every admitted entry would end just at its deadline. With the mean alone, half of them would end too
        late and would have run for nothing. A slightly shorter queue keeps the instances just as busy.
        """
        self._limits = limits
        self._waiting = waiting
        self._batch_s = batch_s
        self._safety_factor = safety_factor

    def refuse_if_late(self, entry: Entry, now: float, free_at: Sequence[float]) -> None:
        """Raise DeadlineExceeded if `entry` would not have run by its deadline."""
        finish = self._expected_finish(entry, now, free_at)
        if finish > entry.deadline:
            raise _too_late(entry, finish)

    def refuse_if_full(
        self,
        rows: float,
        nbytes: int,
        large: bool,
        instances: int,
        tenant: int = 0,
        share: float = 1.0,
        background: bool = False,
    ) -> None:
        """Raise QueueFull unless an entry of so many rows and bytes may wait now.

        If nothing else of its kind waits, an entry of any size may: the bound must not make it impossible.
        What waits in the `background`, at the lowest priority, takes room from its like alone.
        Each of several tenants has its part of the queue, and `share` says how large the part is.
        """
        limits, waiting = self._limits, self._waiting
        if waiting.shares is not None:
            self._refuse_if_part_full(
                waiting.shares, rows, nbytes, large, instances, tenant, share, background
            )
            return
        small_load = waiting.small_load if background else waiting.foreground_load
        load = waiting.large_load if large else small_load
        waiting_bytes = waiting.nbytes - (0 if background else waiting.background.nbytes)
        excess_rows = load + rows - limits.queue_rows if load else 0
        excess_bytes = waiting_bytes + nbytes - limits.queue_bytes if waiting_bytes else 0
        if excess_rows <= 0 and excess_bytes <= 0:
            return
        if excess_rows > 0:
            text = f"the queue is full: {load:.0f} rows wait and {limits.queue_rows} may"
        else:
            text = f"the queue is full: {waiting_bytes} bytes wait and {limits.queue_bytes} may"
        all_load = waiting.small_load + waiting.large_load
        rows_to_run = max(excess_rows, all_load * excess_bytes / max(1, waiting.nbytes))
        raise QueueFull(f"{text}; try again later", retry_after_s=self._seconds_for(rows_to_run, instances))

    def _refuse_if_part_full(
        self,
        shares: FairShares,
        rows: float,
        nbytes: int,
        large: bool,
        instances: int,
        tenant: int,
        share: float,
        background: bool,
    ) -> None:
        own = shares.entries_of(tenant)
        if own is None:
            return
        limits = self._limits
        part = shares.part(tenant, share)
        # Enough for the next batch of each instance: no other tenant may have anything to run.
        most_rows = max(part * limits.queue_rows, instances * limits.batch_rows)
        most_bytes = part * limits.queue_bytes
        small_load = own.small_load if background else own.foreground_load
        load = own.large_load if large else small_load
        own_bytes = own.nbytes - (0 if background else own.background.nbytes)
        excess_rows = load + rows - most_rows if load else 0
        excess_bytes = own_bytes + nbytes - most_bytes if own_bytes else 0
        if excess_rows <= 0 and excess_bytes <= 0:
            return
        if excess_rows > 0:
            text = f"{load:.0f} rows wait and {most_rows:.0f} may"
        else:
            text = f"{own_bytes} bytes wait and {most_bytes:.0f} may"
        all_load = own.small_load + own.large_load
        rows_to_run = max(excess_rows, all_load * excess_bytes / max(1, own.nbytes)) / part
        raise QueueFull(
            f"the part of the queue that is for your key is full: {text}; try again later",
            retry_after_s=self._seconds_for(rows_to_run, instances),
        )

    def bound_by_time(self, instances: int) -> None:
        """Let as many rows wait as `instances` run in `limits.queue_s`, by the last measurements."""
        limits = self._limits
        if limits.queue_s < math.inf:
            full = instances * limits.batch_rows
            rows = limits.queue_s * full / (self._batch_s(limits.batch_rows) or UNKNOWN_BATCH_S)
            limits.queue_rows = max(limits.least_rows, full, min(int(rows), MAX_WAITING_ROWS))

    def wait_s(self, instances: int) -> float:
        """Return the seconds in which `instances` run everything that waits; 0 while the rate is unknown."""
        limit = self._limits.batch_rows
        full, rest = divmod(self._waiting.small_load + self._waiting.large_load, limit)
        work_s = full * self._batch_s(limit) + (self._batch_s(rest) if rest else 0.0)
        return work_s / max(1, instances)

    def _seconds_for(self, rows: float, instances: int) -> float:
        """Return the seconds in which `instances` run `rows` rows in full batches, by the measured rate."""
        limit = self._limits.batch_rows
        return rows / limit * self._batch_s(limit) / max(1, instances)

    def _expected_finish(self, entry: Entry, now: float, free_at: Sequence[float]) -> float:
        """Return when `entry` will have run, if the full batches before it take their measured time."""
        if now > entry.deadline:
            return now
        costly = self._limits.is_costly(entry)
        waiting = self._waiting
        ahead = waiting.small_load + costly * waiting.large_load
        shares = waiting.shares
        if shares is not None:
            ahead = shares.ahead(entry, costly, ahead)
        finish = self._finish_behind(ahead, entry, now, free_at)
        if finish <= entry.deadline:
            return finish
        # Some of these entries run after the new one. Only now, because counting looks at the whole queue.
        order = (entry.priority, costly, entry.deadline, math.inf)
        first = sum(slot.load for slot in waiting.slots() if slot.order < order)
        if shares is not None:
            own = [slot for slot in waiting.slots() if slot.entry.tenant == entry.tenant]
            own_first = sum(slot.load for slot in own if slot.order < order)
            first = min(first, own_first / shares.part(entry.tenant, entry.share))
        ahead = first
        return self._finish_behind(ahead, entry, now, free_at)

    def _finish_behind(self, ahead: float, entry: Entry, now: float, free_at: Sequence[float]) -> float:
        limits = self._limits
        limit = limits.batch_rows
        instances = max(1, len(free_at))
        full, rest = divmod(ahead, limit)
        rounds, next_instance = divmod(full, instances)
        wait_s = max(0.0, sorted(free_at)[int(next_instance)] - now) if free_at else 0.0
        start = now + self._safety_factor() * (rounds * self._batch_s(limit) + wait_s)
        if not limits.is_large(entry):
            return start + self._batch_s(max(entry.load, min(limit, rest + entry.load)))
        slices = math.ceil(entry.load / limits.slice_rows)
        return start + math.ceil(slices / instances) * self._batch_s(limits.slice_rows)


def _too_late(entry: Entry, finish: float) -> DeadlineExceeded:
    left_s = entry.deadline - entry.arrived
    if left_s <= 0:
        return DeadlineExceeded("the deadline passed before the request could be queued; allow it more time")
    return DeadlineExceeded(
        f"the deadline would be missed: estimated {_milliseconds(finish - entry.arrived)},"
        f" {_milliseconds(left_s)} left; allow the request more time, or try again later"
    )


def _milliseconds(seconds: float) -> str:
    """Return a length of time for people, in milliseconds, with at least one digit that is not 0."""
    value = 1000 * seconds
    return f"{value:.1f} ms" if value >= 1 else f"{value:.3g} ms"
