"""Where entries stand in a queue, in the order in which they are to run."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import Final, TypeAlias

from inferpool.pool.ports import Entry, VersionKey

Order: TypeAlias = tuple[float, ...]
"""Tuples compare without a call into Python, and no two orders are equal."""

_NOBODY: Final = Entry(0, VersionKey("", 0), {}, 0, None, 0, 0.0)


class QueueSlot:
    """Where an entry stands in the queue; `live` turns False when it has been taken or dropped.

    A place that is not live lets go of its entry: it may lie in a heap for as long as its deadline is
    away, and the entry's tensors must not. A `large` one is served in pieces; those `behind` are large, or
    parts of one that is.
    """

    __slots__ = ("behind", "entry", "large", "live", "load", "order", "rows", "start")

    def __init__(self, entry: Entry, start: int, large: bool, behind: bool, serial: int) -> None:
        self.entry = entry
        self.start = start
        self.large = large
        self.behind = behind
        self.live = True
        self.rows = entry.rows - start
        self.load = self.rows * entry.row_load
        self.order: Order = (entry.priority, behind, entry.deadline, serial)

    def leave(self) -> None:
        """The entry has been taken or dropped."""
        self.live = False
        self.entry = _NOBODY


class OrderedQueue:
    """Places in their order.

    Most come in it: these stand in a row, and cost one comparison each. The others stand in a heap.
    """

    __slots__ = ("_heap", "_row")

    def __init__(self) -> None:
        self._row: deque[QueueSlot] = deque()
        self._heap: list[tuple[Order, QueueSlot]] = []

    def push(self, place: QueueSlot) -> None:
        """Take a place in."""
        if not self._row or self._row[-1].order < place.order:
            self._row.append(place)
        else:
            heappush(self._heap, (place.order, place))

    def head(self) -> QueueSlot | None:
        """The first that is live; None if none is. It stays."""
        row, heap = self._row, self._heap
        while row and not row[0].live:
            row.popleft()
        while heap and not heap[0][1].live:
            heappop(heap)
        if heap and (not row or heap[0][0] < row[0].order):
            return heap[0][1]
        return row[0] if row else None

    def sweep(self) -> None:
        """Let go of all that are not live."""
        self._row = deque(place for place in self._row if place.live)
        self._heap = [item for item in self._heap if item[1].live]
        heapify(self._heap)
