"""What waits at the lowest priority, and so takes no room in the queue from anything else."""

from __future__ import annotations

from inferpool.pool.ordered_queue import QueueSlot
from inferpool.pool.ports import LOWEST_PRIORITY


class BackgroundLoad:
    """The entries of the lowest priority that wait, of those that cost no more than a full batch.

    Attributes:
        count: how many there are.
        load: their cost, in rows like those that were measured at load.
        nbytes: bytes of their inputs.
    """

    __slots__ = ("count", "load", "nbytes")

    def __init__(self) -> None:
        self.count = self.nbytes = 0
        self.load = 0.0

    def add(self, slot: QueueSlot) -> None:
        """Count a slot that is added to the queue, if it is one of these."""
        if slot.entry.priority == LOWEST_PRIORITY and not slot.low_band:
            self.count += 1
            self.load += slot.load or 1
            self.nbytes += slot.entry.nbytes

    def remove(self, slot: QueueSlot) -> None:
        """Take note that a slot leaves the queue."""
        if slot.entry.priority == LOWEST_PRIORITY and not slot.low_band:
            self.count -= 1
            # 0 is set, because sums of fractions keep rounding errors.
            self.load = self.load - (slot.load or 1) if self.count else 0.0
            self.nbytes -= slot.entry.nbytes
