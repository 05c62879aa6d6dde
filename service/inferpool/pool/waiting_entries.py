"""The entries that wait for a version, in the four orders in which its queue looks at them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable
from heapq import heapify, heappop, heappush
from typing import Final

from inferpool.pool.background_load import BackgroundLoad
from inferpool.pool.fair_shares import FairShares
from inferpool.pool.ordered_queue import Group, OrderedQueue, QueueSlot
from inferpool.pool.ports import Entry

_MAX_DEAD_SLOTS: Final = 512
"""Dead slots that may be left in the orders, beside one for each entry that waits."""


class WaitingEntries:
    """The entries that wait: in the order to run, by group, by arrival and by deadline.

    A slot stands in several orders at once. Removing it only marks it as dead, and an order skips a dead slot
    that has come to its front.

    Attributes:
        rows: rows that wait; an entry without rows counts as one.
        nbytes: bytes of inputs that wait.
        small_load: cost of the small requests that wait, in rows like those that were measured at load.
        large_load: likewise, of the requests that cost more than a full batch.
        background: what of the small requests waits at the lowest priority.
        shares: the same entries by tenant; None unless several tenants share the instances.
    """

    __slots__ = (
        "_arrivals", "_dead_slots", "_deadlines", "_groups", "_in_order", "_large_count", "_serial", "_slots",
        "background", "large_load", "nbytes", "rows", "shares", "small_load",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rows = 0
        self.nbytes = 0
        self.small_load = 0.0
        self.large_load = 0.0
        self.background = BackgroundLoad()
        self.shares: FairShares | None = None
        self._slots: dict[int, QueueSlot] = {}
        self._in_order = OrderedQueue()
        self._groups: dict[Hashable, Group] = {}
        self._arrivals: deque[QueueSlot] = deque()
        self._deadlines: list[tuple[float, int, QueueSlot]] = []
        self._serial = 0
        self._dead_slots = 0
        self._large_count = 0  # slots whose load is in `large_load`

    def __len__(self) -> int:
        """How many entries wait; an entry that runs in slices counts while rows of it wait."""
        return len(self._slots)

    def add(self, entry: Entry, start: int, is_large: bool, low_band: bool) -> None:
        """Add the rows of `entry` from `start` on."""
        self._serial += 1
        slot = QueueSlot(entry, start, is_large, low_band, self._serial)
        self._slots[entry.id] = slot
        self.rows += max(1, slot.rows)
        self.nbytes += entry.nbytes
        if low_band:
            self._large_count += 1
            self.large_load += slot.load or 1
        else:
            self.small_load += slot.load or 1
        self.background.add(slot)
        self._in_order.push(slot)
        self._arrivals.append(slot)
        if not is_large:
            group = self._groups.get(entry.group)
            if group is None:
                group = self._groups[entry.group] = Group()
            group.slots.push(slot)
            group.load += entry.load
            group.count += 1
        if entry.deadline < math.inf:
            heappush(self._deadlines, (entry.deadline, self._serial, slot))
        if self.shares is not None:
            self.shares.add(slot)

    def remove(self, slot: QueueSlot) -> Entry:
        """Take a live slot out of every order; returns its entry."""
        entry = slot.entry
        del self._slots[entry.id]
        self.rows -= max(1, slot.rows)
        self.nbytes -= entry.nbytes
        # Loads are fractions, and sums of these keep rounding errors: 0 has to be set. If nothing waits, an
        # entry of any size is admitted.
        if slot.low_band:
            self._large_count -= 1
            self.large_load = self.large_load - (slot.load or 1) if self._large_count else 0.0
        elif len(self._slots) > self._large_count:
            self.small_load -= slot.load or 1
        else:
            self.small_load = 0.0
        self.background.remove(slot)
        if not slot.is_large:
            group = self._groups[entry.group]
            group.load -= entry.load
            group.count -= 1
            if not group.count:
                # Clients choose row shapes, so an empty group must not stay behind for each one.
                del self._groups[entry.group]
        if self.shares is not None:
            self.shares.remove(slot)
        slot.kill()
        self._dead_slots += 1
        if self._dead_slots > _MAX_DEAD_SLOTS + len(self._slots):
            self._sweep()
        return entry

    @property
    def foreground_load(self) -> float:
        """Cost of the small requests that wait, without those of the lowest priority."""
        small = len(self._slots) - self._large_count
        return self.small_load - self.background.load if small > self.background.count else 0.0

    def find(self, entry_id: int) -> QueueSlot | None:
        """Return the slot of an entry; None if no row of it waits."""
        return self._slots.get(entry_id)

    def slots(self) -> Iterable[QueueSlot]:
        """Return every live slot."""
        return self._slots.values()

    def first(self) -> QueueSlot | None:
        """Return the slot that is to run first; None if none waits."""
        return self._in_order.first()

    def oldest(self) -> QueueSlot | None:
        """Return the slot that has waited longest; None if none waits."""
        while self._arrivals and not self._arrivals[0].is_live:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None

    def most_urgent(self) -> QueueSlot | None:
        """Return the slot with the earliest deadline; None if no slot has a deadline."""
        while self._deadlines and not self._deadlines[0][2].is_live:
            heappop(self._deadlines)
        return self._deadlines[0][2] if self._deadlines else None

    def group_of(self, slot: QueueSlot) -> Group:
        """Return the group of a live slot that is not large."""
        return self._groups[slot.entry.group]

    def _sweep(self) -> None:
        """Let go of all dead slots, of which there may otherwise be any number."""
        self._dead_slots = 0
        self._arrivals = deque(slot for slot in self._arrivals if slot.is_live)
        self._in_order.sweep()
        self._deadlines = [item for item in self._deadlines if item[2].is_live]
        heapify(self._deadlines)
        for group in self._groups.values():
            group.slots.sweep()
        if self.shares is not None:
            self.shares.sweep()
