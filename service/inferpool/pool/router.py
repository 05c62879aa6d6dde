"""Routes entries to the pool of their version."""

from __future__ import annotations

from inferpool.errors import NotReady
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Entry, VersionKey


class PoolRouter:
    """All pools of a server, as one `Inbox`."""

    def __init__(self) -> None:
        self._pools: dict[VersionKey, Pool] = {}

    def add(self, pool: Pool) -> None:
        """Route the entries of the pool's version to `pool`."""
        self._pools[pool.key] = pool

    def remove(self, key: VersionKey) -> Pool | None:
        """Remove and return the version's pool, which keeps its entries; None if there is none."""
        return self._pools.pop(key, None)

    def pools(self) -> list[Pool]:
        """Return every pool, in the order in which they were added."""
        return list(self._pools.values())

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady or Draining."""
        self._pool(entry.key).offer(entry)

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        """Raise the error with which `key` would refuse any entry of `tenant` now, whatever its inputs."""
        self._pool(key).refuse_early(tenant)

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry if it still waits; `reason` is `disconnected` or `deadline`."""
        pool = self._pools.get(key)
        if pool is not None:
            pool.cancel(entry_id, reason)

    def _pool(self, key: VersionKey) -> Pool:
        pool = self._pools.get(key)
        if pool is None:
            raise NotReady(f'version {key.version} of "{key.model}" is not ready; try again later')
        return pool
