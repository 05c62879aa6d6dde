"""Entries of a queue in the order in which they are to run."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import Final, TypeAlias

from inferpool.pool.ports import Entry, VersionKey

Order: TypeAlias = tuple[float, ...]
"""Tuples compare without a call into Python, and no two orders are equal."""

_NO_ENTRY: Final = Entry(0, VersionKey("", 0), {}, 0, None, 0, 0.0)


class QueueSlot:
    """Where an entry stands in the queue.

    Attributes:
        entry: the entry that waits; a dead slot has let go of it.
        start: first row that waits.
        rows: how many rows wait.
        load: cost of these rows, in rows like those that were measured at load.
        is_large: whether the entry runs in slices.
        low_band: whether the slot stands behind all small requests: it is large, or part of a large request,
            or a row that costs more than a full batch.
        is_live: False once the entry has been taken or dropped.
    """

    __slots__ = (
        "_deadline", "_priority", "_serial", "entry", "is_large", "is_live", "load", "low_band", "rows",
        "start",
    )  # fmt: skip

    def __init__(self, entry: Entry, start: int, is_large: bool, low_band: bool, serial: int) -> None:
        self.entry = entry
        self.start = start
        self.is_large = is_large
        self.low_band = low_band
        self.is_live = True
        self.rows = entry.rows - start
        self.load = self.rows * entry.row_load
        self._priority = entry.priority
        self._deadline = entry.deadline
        self._serial = serial

    @property
    def order(self) -> Order:
        """Sorts slots into the order in which they are to run."""
        return (self._priority, self.low_band, self._deadline, self._serial)

    def precedes(self, other: QueueSlot) -> bool:
        """Return whether this slot has the smaller `order`; no tuple has to be made to find out."""
        if self._priority != other._priority:
            return self._priority < other._priority
        if self.low_band != other.low_band:
            return other.low_band
        if self._deadline != other._deadline:
            return self._deadline < other._deadline
        return self._serial < other._serial

    def kill(self) -> None:
        """Mark the slot as dead, and let go of its entry.

        A dead slot may stay in a heap until its deadline, and must not keep the entry's tensors in memory.
        """
        self.is_live = False
        self.entry = _NO_ENTRY


class OrderedQueue:
    """Slots in their order.

    Most slots are added in order. These stand in a deque and cost one comparison each; the rest are in a
    heap.
    """

    __slots__ = ("_heap", "_last", "_sorted")

    def __init__(self) -> None:
        self._sorted: deque[QueueSlot] = deque()
        self._last: QueueSlot | None = None  # of the deque, if that is not empty
        self._heap: list[tuple[Order, QueueSlot]] = []

    def push(self, slot: QueueSlot) -> None:
        """Add a slot."""
        last = self._last
        if last is None or not self._sorted or last.precedes(slot):
            self._sorted.append(slot)
            self._last = slot
        else:
            heappush(self._heap, (slot.order, slot))

    def first(self) -> QueueSlot | None:
        """Return the first live slot, without removing it; None if there is none."""
        in_order, heap = self._sorted, self._heap
        while in_order and not in_order[0].is_live:
            in_order.popleft()
        while heap and not heap[0][1].is_live:
            heappop(heap)
        if heap and (not in_order or heap[0][1].precedes(in_order[0])):
            return heap[0][1]
        return in_order[0] if in_order else None

    def sweep(self) -> None:
        """Let go of all dead slots."""
        self._sorted = deque(slot for slot in self._sorted if slot.is_live)
        self._last = self._sorted[-1] if self._sorted else None
        self._heap = [item for item in self._heap if item[1].is_live]
        heapify(self._heap)


class Group:
    """The entries that may share a batch. `load` and `count` are those of the live slots."""

    __slots__ = ("count", "load", "slots")

    def __init__(self) -> None:
        self.slots = OrderedQueue()
        self.load = 0.0
        self.count = 0
