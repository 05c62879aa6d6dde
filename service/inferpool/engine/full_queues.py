"""Remembers for a moment which queues of an engine were full, so that bodies for them are refused early."""

from __future__ import annotations

from typing import Final

from inferpool.errors import QueueFull
from inferpool.pool.ports import Entry, VersionKey

MOST_FULL_S: Final = 0.1
"""A queue that was full counts as full no longer than this, unless it refuses another entry."""


class FullQueues:
    """The refusals of queues that were full a moment ago, by version and tenant."""

    __slots__ = ("_full",)

    def __init__(self) -> None:
        self._full: dict[tuple[VersionKey, int], tuple[QueueFull, float]] = {}

    def check(self, key: VersionKey, tenant: int, now: float) -> None:
        """Raise QueueFull if the queue of the version refused an entry of the tenant a moment ago."""
        if self._full and (key, tenant) in self._full:
            full, until = self._full[key, tenant]
            if now < until:
                raise QueueFull(full.detail, full.retry_after_s)
            del self._full[key, tenant]

    def refused(self, entry: Entry, error: QueueFull, now: float) -> None:
        """Take note that the queue has no room for the entry."""
        full_s = min(error.retry_after_s, MOST_FULL_S)
        self._full[entry.key, entry.tenant] = (error, now + full_s)

    def ended(self, entry: Entry) -> None:
        """Take note that an entry has ended: the queue has room for another one."""
        if self._full:
            self._full.pop((entry.key, entry.tenant), None)

    def clear(self) -> None:
        """Forget all: the queues are gone with their engine."""
        self._full.clear()
