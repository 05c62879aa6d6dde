"""Routes entries to the pool of their version."""

from __future__ import annotations

from inferpool.errors import Draining, NotReady
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Entry, VersionKey


class PoolRouter:
    """All pools of a server, as one `Inbox`."""

    def __init__(self) -> None:
        self._pools: dict[VersionKey, Pool] = {}
        # They take no entries any more, and finish those that they have.
        self._leaving: list[Pool] = []

    def add(self, pool: Pool) -> None:
        """Route the entries of the pool's version to `pool`, in place of an earlier pool of the version."""
        before = self._pools.get(pool.key)
        if before is not None:
            self._leaving = [*self._leaving, before]
        self._pools[pool.key] = pool

    def remove(self, key: VersionKey) -> None:
        """Route no more entries to the version's pool, which keeps those that it has."""
        pool = self._pools.pop(key, None)
        if pool is not None:
            self._leaving = [*self._leaving, pool]

    def forget(self, pool: Pool) -> None:
        """Take note that a pool that takes no more entries has finished its last one."""
        self._leaving = [other for other in self._leaving if other is not pool]

    def pools(self) -> list[Pool]:
        """Return every pool, in the order in which they were added; those that take no entries come last."""
        return [*self._pools.values(), *self._leaving]

    def release_memory(self) -> None:
        """Free memory that runtimes keep for later runs."""
        for pool in self.pools():
            pool.release_memory()

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady or Draining."""
        pool = self._pool(entry.key)
        try:
            pool.offer(entry)
        except Draining:
            # Another pool may have taken the place of this one since the line above.
            if self._pools.get(entry.key) is pool:
                raise
            self.offer(entry)

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        """Raise the error with which `key` would refuse any entry of `tenant` now, whatever its inputs."""
        self._pool(key).refuse_early(tenant)

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry if it still waits; `reason` is `disconnected` or `deadline`."""
        pool = self._pools.get(key)
        if pool is not None:
            pool.cancel(entry_id, reason)
        for leaving in self._leaving:
            if leaving.key == key:
                leaving.cancel(entry_id, reason)

    def _pool(self, key: VersionKey) -> Pool:
        pool = self._pools.get(key)
        if pool is None:
            raise NotReady(f'version {key.version} of "{key.model}" is not ready; try again later')
        return pool
