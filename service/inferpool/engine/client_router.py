"""Routes the entries of a web process to the engines that have their versions."""

from __future__ import annotations

from collections.abc import Mapping

from inferpool.engine.client import EngineClient
from inferpool.errors import NotReady
from inferpool.pool.ports import Entry, VersionKey


class ClientRouter:
    """The engines that a web process knows, as one `Inbox`. For the event loop alone."""

    __slots__ = ("_clients", "_every")

    def __init__(self) -> None:
        self._clients: dict[VersionKey, EngineClient] = {}
        # Versions move between engines, and an entry stays where it was offered.
        self._every: list[EngineClient] = []

    def route(self, clients: Mapping[VersionKey, EngineClient]) -> None:
        """Take the client of each version's engine in place of the last ones."""
        self._clients = dict(clients)
        for client in clients.values():
            if client not in self._every:
                self._every.append(client)
        for client in self._every:
            client.reroute(self._clients)
        self._every = [client for client in self._every if not client.is_over]

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady, Overloaded or Draining."""
        client = self._clients.get(entry.key)
        if client is None:
            raise _not_ready(entry.key)
        client.offer(entry)

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        """Raise the error with which `key` would refuse any entry of `tenant` now, whatever its inputs."""
        client = self._clients.get(key)
        if client is None:
            raise _not_ready(key)
        client.refuse_early(key, tenant)

    def lend(self, key: VersionKey, nbytes: int, tensors_at: int) -> memoryview | None:
        """Return memory for a body of `key`, see `EngineClient.lend`; None if it is to be elsewhere."""
        client = self._clients.get(key)
        return None if client is None else client.lend(nbytes, tensors_at)

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry if it still waits; `reason` is `disconnected` or `deadline`."""
        for client in self._every:
            client.cancel(key, entry_id, reason)

    def release(self, key: VersionKey, entry_id: int) -> None:
        """Take back the memory of an entry, whose answer is out."""
        for client in self._every:
            client.release(key, entry_id)


def _not_ready(key: VersionKey) -> NotReady:
    return NotReady(f'version {key.version} of "{key.model}" is not ready; try again later')
