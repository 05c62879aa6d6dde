"""The queue of a version: which entries are taken next, which are refused, which are dropped.

Pure policy. There is no clock (moments come in as `now`), no thread and no lock: the pool holds its own
lock around every call.

The order. Within a priority, entries that fit in a batch come before pieces of larger ones, then the
earliest deadline, then the first come. A batch is led by the entry that is first in this order and
filled, in order, with entries of its group; nothing overtakes an entry of its own group that does not
fit. Against starvation, every fourth batch is led by the entry that has waited longest, whatever its
priority or deadline, so an entry with n older ones before it waits for 4 (n + 1) batches at most.

An entry with more rows than a batch takes is served in pieces of half a batch. Each piece runs by itself,
and after each the rest queues up again behind what has come meanwhile: a request of 10,000 rows costs its
neighbours the piece that is running, no more, and less than the largest batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

from inferpool.errors import DeadlineExceeded, QueueFull
from inferpool.pool.ordered_queue import OrderedQueue, QueueSlot
from inferpool.pool.ports import Entry

UNKNOWN_BATCH_S: Final = 1e-3
"""What a batch is taken to last while nothing has been measured."""
MOST_WAITING_ROWS: Final = 1_000_000
OLDEST_LEADS_EVERY: Final = 4
"""One batch in this many is led by the entry that has waited longest."""


@dataclass(slots=True)
class Limits:
    """The bounds of a queue.

    Attributes:
        batch_rows: rows that a batch may have; 1 where the version is not batched.
        queue_rows: rows that may wait; entries that fit in a batch and larger ones are bounded apart.
        queue_bytes: bytes of inputs that may wait.
        queue_s: seconds of work that may wait: `queue_rows` follows what was measured last. Infinity where
            it is set.
        least_rows: rows that may wait however long they take, beside a batch for each instance.
        delay_s: seconds that a batch which is not full may wait, from the arrival of the first entry.
    """

    batch_rows: int
    queue_rows: int
    queue_bytes: int
    queue_s: float = math.inf
    least_rows: int = 1
    delay_s: float = 0.0


class Piece:
    """The rows `start` to `stop` of an entry, which run together."""

    __slots__ = ("entry", "start", "stop")

    def __init__(self, entry: Entry, start: int, stop: int) -> None:
        self.entry = entry
        self.start = start
        self.stop = stop

    @property
    def rows(self) -> int:
        """How many rows the piece has."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether the piece is all of its entry."""
        return self.stop - self.start == self.entry.rows


class Drop(NamedTuple):
    """An entry that left the queue without having run to its end, and why."""

    entry: Entry
    reason: str


class Take:
    """What `Queue.take` decided.

    Attributes:
        pieces: the batch; empty if nothing is to run now.
        drops: entries whose deadline cannot be met, each reported once.
        reason: why the batch is no larger: `full`, `drained` (nothing else of its kind waits),
            `deadline` (more rows would have made one of its entries late) or `piece` (of a larger entry).
    """

    __slots__ = ("drops", "pieces", "reason")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.drops: list[Drop] = []
        self.reason = ""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return sum(piece.stop - piece.start for piece in self.pieces)


DEADLINE_SLACK_S: Final = 0.005
"""A delayed batch starts this long before a deadline needs it to: timers and threads wake late."""

_STALE_AT_MOST: Final = 512


class _Group:
    """The entries that may share a batch, first come by order; `load` and `count` are of the live."""

    __slots__ = ("count", "line", "load")

    def __init__(self) -> None:
        self.line = OrderedQueue()
        self.load = 0.0
        self.count = 0


class Queue:
    """Entries of one version that wait for an instance."""

    def __init__(
        self, limits: Limits, cost_s: Callable[[float], float], caution: Callable[[], float] = lambda: 1.0
    ) -> None:
        """`cost_s(rows)` is the expected seconds of a batch of so many rows (0 while unknown).

        Where rows are of different lengths, `Limits` and `cost_s` count rows of the measured length.

        What waits before an entry is reckoned to take `caution()` times that when the entry is let in. In a
        full queue everything admitted ends just as its deadline comes: at the mean, half of it would end too
        late, and have run in vain. A queue that is somewhat shorter keeps the instances as busy.
        """
        self.limits = limits
        self.cost_s = cost_s
        self.caution = caution
        self.bytes = 0
        self._small_rows = 0.0
        self._large_rows = 0.0
        self._waiting_rows = 0
        self._serial = 0
        self._probe = 0
        self._batches = 0
        self._places: dict[int, QueueSlot] = {}
        # A place is in several of these; where it is no longer live it is skipped when it comes up.
        self._stale = 0
        self._first = OrderedQueue()
        self._groups: dict[Hashable, _Group] = {}
        self._arrivals: deque[QueueSlot] = deque()
        self._deadlines: list[tuple[float, int, QueueSlot]] = []

    def __len__(self) -> int:
        """How many entries wait; one that is served in pieces counts while rows of it wait."""
        return len(self._places)

    @property
    def _piece_rows(self) -> int:
        return max(1, self.limits.batch_rows // 2)

    @property
    def rows(self) -> int:
        """How many rows wait; an entry without rows counts as one."""
        return self._waiting_rows

    @property
    def load(self) -> float:
        """What waits, in rows of the measured length."""
        return self._small_rows + self._large_rows

    def offer(self, entry: Entry, now: float, free_at: Sequence[float] = (), *, probe: bool = False) -> None:
        """Let `entry` wait, or raise.

        `free_at` has, for each instance, the moment at which it is expected to be free (a past moment
        if it is idle). Raises QueueFull if rows or bytes are over their bounds, and DeadlineExceeded if
        the deadline has passed, or will have passed before the entry has run, by the measured rate.

        An entry with parts is refused or let in as one; it is its parts that wait.

        With `probe` an idle instance takes the entry whatever was measured: a wrong measurement could not
        be put right if it kept everything from running.
        """
        probe = probe and not self._places and min(free_at, default=now) <= now < entry.deadline
        if probe:
            self._probe = entry.parts[0].entry.id if entry.parts else entry.id
        elif entry.deadline < math.inf:
            finish = self._predicted_finish(entry, now, free_at)
            if finish > entry.deadline:
                raise _too_late(entry, finish)
        large = self.is_large(entry)
        self.refuse_if_full(entry.load, entry.nbytes, large, len(free_at))
        if not entry.parts:
            self._accept(entry, large=large, behind=large)
        for part in entry.parts:
            self._accept(part.entry, large=self.is_large(part.entry), behind=large)

    def is_large(self, entry: Entry) -> bool:
        """Whether an entry is more than a batch takes, and can be served in pieces."""
        return entry.rows > 1 and entry.load > self.limits.batch_rows

    def refuse_if_full(self, rows: float, nbytes: int, large: bool, instances: int) -> None:
        """Raise QueueFull unless an entry of so many rows and bytes may wait now.

        Where nothing of its kind waits, an entry of any size may: a bound must not make it impossible.
        """
        waiting = self._large_rows if large else self._small_rows
        over_rows = waiting + rows - self.limits.queue_rows if waiting else 0
        over_bytes = self.bytes + nbytes - self.limits.queue_bytes if self.bytes else 0
        if over_rows <= 0 and over_bytes <= 0:
            return
        what = f"{waiting:.0f} rows" if over_rows > 0 else f"{self.bytes} bytes"
        load = self._small_rows + self._large_rows
        excess_rows = max(over_rows, load * over_bytes / max(1, self.bytes))
        raise QueueFull(
            f"{what} are waiting for this model already",
            retry_after_s=self.seconds_for(excess_rows, instances),
        )

    def bound_by_time(self, instances: int) -> None:
        """Let as many rows wait as `instances` work off in `limits.queue_s`, by what was measured last."""
        limits = self.limits
        if limits.queue_s < math.inf:
            full = instances * limits.batch_rows
            rows = limits.queue_s * full / (self.cost_s(limits.batch_rows) or UNKNOWN_BATCH_S)
            limits.queue_rows = max(limits.least_rows, full, min(int(rows), MOST_WAITING_ROWS))

    def seconds_for(self, rows: float, instances: int) -> float:
        """Seconds in which `instances` work off `rows` rows in full batches, by the measured rate."""
        limit = self.limits.batch_rows
        return rows / limit * self.cost_s(limit) / max(1, instances)

    def wait_s(self, instances: int) -> float:
        """Seconds in which `instances` work off what waits, by the measured rate; 0 while that is unknown."""
        limit = self.limits.batch_rows
        full, rest = divmod(self._small_rows + self._large_rows, limit)
        work_s = full * self.cost_s(limit) + (self.cost_s(rest) if rest else 0.0)
        return work_s / max(1, instances)

    def cancel(self, entry_id: int, reason: str) -> Drop | None:
        """Take an entry that still waits out of the queue; None if no row of it waits any more."""
        place = self._places.get(entry_id)
        return self._drop(place, reason) if place is not None else None

    def take(self, now: float) -> Take:
        """The batch that a free instance runs now, perhaps none, and the entries that never will."""
        taken = Take()
        self._drop_expired(now, taken.drops)
        lead = self._lead(now, taken.drops)
        if lead is None:
            return taken
        if lead.large:
            self._take_piece(lead, taken)
        elif not self._delays(lead, now):
            self._take_group(lead, now, taken)
        if taken.pieces:
            self._batches += 1
        return taken

    def next_wakeup(self, now: float) -> float | None:
        """The moment at which `take` will decide otherwise without an offer; None if it will not."""
        moments = []
        if (soonest := self._soonest_deadline()) is not None:
            moments.append(soonest)
        if self.limits.delay_s > 0 and (lead := self._first.head()) is not None:
            moments.append(self._delay_ends(lead))
        return max(now, min(moments)) if moments else None

    def oldest_age_s(self, now: float) -> float:
        """Seconds that the entry which came first has waited; 0 if none waits."""
        oldest = self._oldest()
        return max(0.0, now - oldest.entry.arrived) if oldest is not None else 0.0

    def drop_all(self, reason: str) -> list[Drop]:
        """Empty the queue."""
        return [self._drop(place, reason) for place in list(self._places.values())]

    # The order: who leads, who follows.

    def _lead(self, now: float, drops: list[Drop]) -> QueueSlot | None:
        by_age = self._batches % OLDEST_LEADS_EVERY == OLDEST_LEADS_EVERY - 1
        while True:
            place = self._oldest() if by_age else self._first.head()
            if place is None or place.entry.id == self._probe:
                return place
            if now + self.cost_s(self._load_alone(place)) <= place.entry.deadline:
                return place
            drops.append(self._drop(place, "deadline"))

    def _take_group(self, lead: QueueSlot, now: float, taken: Take) -> None:
        group = self._groups[lead.entry.group]
        rows, deadline = lead.load, lead.entry.deadline
        self._leave(lead, taken)
        taken.reason = "drained"
        while (follower := group.line.head()) is not None:
            grown = rows + follower.load
            if grown > self.limits.batch_rows:
                taken.reason = "full"
                return
            soonest = min(deadline, follower.entry.deadline)
            if soonest < math.inf and now + self.cost_s(grown) > soonest:
                if now + self.cost_s(follower.load) > follower.entry.deadline:
                    taken.drops.append(self._drop(follower, "deadline"))
                    continue
                taken.reason = "deadline"
                return
            self._leave(follower, taken)
            rows, deadline = grown, soonest
        if rows >= self.limits.batch_rows:
            taken.reason = "full"

    def _leave(self, place: QueueSlot, taken: Take) -> None:
        entry = self._forget(place)
        self._count(-(entry.load or 1), place.behind)
        self.bytes -= entry.nbytes
        taken.pieces.append(Piece(entry, 0, entry.rows))

    def _take_piece(self, place: QueueSlot, taken: Take) -> None:
        start, row_load = place.start, place.entry.row_load
        rows = min(place.rows, max(1, int(self._piece_rows / row_load)))
        entry = self._forget(place)
        self._large_rows -= rows * row_load
        if start + rows < entry.rows:
            self._enter(entry, start + rows, large=True, behind=True)
        else:
            self.bytes -= entry.nbytes
        taken.pieces.append(Piece(entry, start, start + rows))
        taken.reason = "piece"

    def _delays(self, lead: QueueSlot, now: float) -> bool:
        return (
            self.limits.delay_s > 0
            and self._groups[lead.entry.group].load < self.limits.batch_rows
            and now < self._delay_ends(lead)
        )

    def _delay_ends(self, lead: QueueSlot) -> float:
        oldest = self._oldest()
        assert oldest is not None  # the lead waits, so something does
        ends = oldest.entry.arrived + self.limits.delay_s
        if (soonest := self._soonest_deadline()) is not None:
            ends = min(ends, soonest - self.cost_s(self.limits.batch_rows) - DEADLINE_SLACK_S)
        return ends

    # Admission.

    def _predicted_finish(self, entry: Entry, now: float, free_at: Sequence[float]) -> float:
        """When `entry` will have run, if full batches before it take their measured time."""
        if now > entry.deadline:
            return now
        large = self.is_large(entry)
        finish = self._finish_behind(self._small_rows + large * self._large_rows, entry, now, free_at)
        if finish <= entry.deadline:
            return finish
        order = (entry.priority, large, entry.deadline, self._serial + 1)
        ahead = sum(place.load for place in self._places.values() if place.order < order)
        return self._finish_behind(ahead, entry, now, free_at)

    def _finish_behind(self, ahead: float, entry: Entry, now: float, free_at: Sequence[float]) -> float:
        limit = self.limits.batch_rows
        instances = max(1, len(free_at))
        full, rest = divmod(ahead, limit)
        rounds, turn = divmod(full, instances)
        wait_s = max(0.0, sorted(free_at)[int(turn)] - now) if free_at else 0.0
        start = now + self.caution() * (rounds * self.cost_s(limit) + wait_s)
        if not self.is_large(entry):
            return start + self.cost_s(max(entry.load, min(limit, rest + entry.load)))
        pieces = math.ceil(entry.load / self._piece_rows)
        return start + math.ceil(pieces / instances) * self.cost_s(self._piece_rows)

    # Bookkeeping.

    def _accept(self, entry: Entry, *, large: bool, behind: bool) -> None:
        self._enter(entry, 0, large=large, behind=behind)
        self.bytes += entry.nbytes
        self._count(entry.load or 1, behind)

    def _count(self, load: float, behind: bool) -> None:
        if behind:
            self._large_rows += load
        else:
            self._small_rows += load

    def _load_alone(self, place: QueueSlot) -> float:
        return min(place.load, self.limits.batch_rows) if place.large else place.load

    def _enter(self, entry: Entry, start: int, *, large: bool, behind: bool) -> None:
        self._serial += 1
        place = QueueSlot(entry, start, large, behind, self._serial)
        self._places[entry.id] = place
        self._waiting_rows += max(1, place.rows)
        self._first.push(place)
        self._arrivals.append(place)
        if not large:
            group = self._groups.get(entry.group)
            if group is None:
                group = self._groups[entry.group] = _Group()
            group.line.push(place)
            group.load += entry.load
            group.count += 1
        if entry.deadline < math.inf:
            heappush(self._deadlines, (entry.deadline, self._serial, place))

    def _forget(self, place: QueueSlot) -> Entry:
        entry = place.entry
        del self._places[entry.id]
        self._waiting_rows -= max(1, place.rows)
        if not place.large:
            group = self._groups[entry.group]
            group.load -= entry.load
            group.count -= 1
            if not group.count:
                # Row shapes are the clients' choice: nothing may stay behind for each that was seen.
                del self._groups[entry.group]
        place.leave()
        self._stale += 1
        if self._stale > _STALE_AT_MOST + len(self._places):
            self._sweep()
        return entry

    def _sweep(self) -> None:
        self._stale = 0
        self._arrivals = deque(place for place in self._arrivals if place.live)
        self._first.sweep()
        self._deadlines = [item for item in self._deadlines if item[2].live]
        heapify(self._deadlines)
        for group in self._groups.values():
            group.line.sweep()

    def _drop(self, place: QueueSlot, reason: str) -> Drop:
        load = place.load or 1
        entry = self._forget(place)
        self.bytes -= entry.nbytes
        self._count(-load, place.behind)
        return Drop(entry, reason)

    def _drop_expired(self, now: float, drops: list[Drop]) -> None:
        while (soonest := self._soonest_deadline()) is not None and soonest <= now:
            drops.append(self._drop(self._deadlines[0][2], "deadline"))

    def _soonest_deadline(self) -> float | None:
        while self._deadlines and not self._deadlines[0][2].live:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _oldest(self) -> QueueSlot | None:
        while self._arrivals and not self._arrivals[0].live:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None


def _too_late(entry: Entry, finish: float) -> DeadlineExceeded:
    left_s = entry.deadline - entry.arrived
    if left_s <= 0:
        return DeadlineExceeded("the deadline passed before the request could be put in the queue")
    return DeadlineExceeded(
        "the answer may come too late: as batches take now, now more, now less, it may take"
        f" {_milliseconds(finish - entry.arrived)}, and {_milliseconds(left_s)} are left of the timeout"
    )


def _milliseconds(seconds: float) -> str:
    """A length of time for people, in milliseconds: never so few digits that nothing is left of it."""
    value = 1000 * seconds
    return f"{value:.1f} ms" if value >= 1 else f"{value:.3g} ms"
