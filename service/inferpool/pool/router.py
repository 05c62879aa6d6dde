"""The inbox of a server: finds the pool of each entry's version."""

from __future__ import annotations

from inferpool.errors import NotReady
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Entry, VersionKey


class PoolRouter:
    """All pools of a server, as one `Inbox`."""

    def __init__(self) -> None:
        self._pools: dict[VersionKey, Pool] = {}

    def add(self, pool: Pool) -> None:
        """Let `pool` take the entries of its version."""
        self._pools[pool.key] = pool

    def remove(self, key: VersionKey) -> Pool | None:
        """Take the version's pool out; its entries stay with it."""
        return self._pools.pop(key, None)

    def pools(self) -> list[Pool]:
        """Every pool, in the order they were added."""
        return list(self._pools.values())

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady or Draining."""
        self._pool(entry.key).offer(entry)

    def refuse_early(self, key: VersionKey) -> None:
        """Raise what any entry for `key` would be refused with now, whatever is in it."""
        self._pool(key).refuse_early()

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry if it still waits; `reason` is `disconnected` or `deadline`."""
        pool = self._pools.get(key)
        if pool is not None:
            pool.cancel(entry_id, reason)

    def _pool(self, key: VersionKey) -> Pool:
        pool = self._pools.get(key)
        if pool is None:
            raise NotReady(f'version {key.version} of "{key.model}" is not ready')
        return pool
