"""Routes the entries of a web process to the engines that have their versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inferpool.engine.client import EngineClient, least_busy
from inferpool.engine.lent_bodies import LEAST_LENT_BYTES
from inferpool.errors import NotReady, Overloaded
from inferpool.pool.ports import Entry, VersionKey


class ClientRouter:
    """The engines that a web process knows, as one `Inbox`. For the event loop alone.

    An entry of a version in several engines goes to the one with the fewest rows of this process. If several
    have equally few, they take turns.
    """

    __slots__ = ("_clients", "_every", "_several", "_turn")

    def __init__(self) -> None:
        # The versions that are in one engine, and those in several.
        self._clients: dict[VersionKey, EngineClient] = {}
        self._several: dict[VersionKey, list[EngineClient]] = {}
        self._turn = 0
        # Versions move between engines, and an entry stays where it was offered.
        self._every: list[EngineClient] = []

    def route(self, clients: Mapping[VersionKey, Sequence[EngineClient]]) -> None:
        """Take the clients of each version's engines in place of the last ones."""
        self._clients = {key: found[0] for key, found in clients.items() if len(found) == 1}
        self._several = {key: list(found) for key, found in clients.items() if len(found) > 1}
        for found in clients.values():
            for client in found:
                if client not in self._every:
                    self._every.append(client)
        for client in self._every:
            client.reroute(clients)
        self._every = [client for client in self._every if not client.is_over]

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady, Overloaded or Draining."""
        client = self._clients.get(entry.key)
        if client is None:
            self._offer_to_several(entry)
        else:
            client.offer(entry)

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        """Raise the error with which `key` would refuse any entry of `tenant` now, whatever its inputs."""
        client = self._clients.get(key)
        if client is None:
            client = self._choose(key)
        client.refuse_early(key, tenant)

    def lend(self, key: VersionKey, nbytes: int, tensors_at: int) -> memoryview | None:
        """Return memory for a body of `key`, see `EngineClient.lend`; None if it is to be elsewhere."""
        client = self._clients.get(key)
        if client is None and key in self._several:
            client = self._choose(key)
        return None if client is None else client.lend(nbytes, tensors_at)

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        """Drop the entry if it still waits; `reason` is `disconnected` or `deadline`."""
        for client in self._every:
            client.cancel(key, entry_id, reason)

    def release(self, key: VersionKey, entry_id: int) -> None:
        """Take back the memory of an entry, whose answer is out."""
        for client in self._every:
            client.release(key, entry_id)

    def _offer_to_several(self, entry: Entry) -> None:
        if entry.nbytes >= LEAST_LENT_BYTES:
            for client in self._several.get(entry.key, ()):
                if client.is_attached and client.has_lent(entry):
                    client.offer(entry)
                    return
        chosen = self._choose(entry.key)
        try:
            chosen.offer(entry)
        except Overloaded:
            others = [each for each in self._several[entry.key] if each is not chosen and each.is_attached]
            if not others:
                raise
            least_busy(others).offer(entry)

    def _choose(self, key: VersionKey) -> EngineClient:
        """The engine for the next entry of a version that is in several; raises NotReady if it is in none."""
        found = self._several.get(key)
        if found is None:
            raise NotReady(f'version {key.version} of "{key.model}" is not ready; try again later')
        self._turn += 1
        start = self._turn % len(found)
        attached = [client for client in (*found[start:], *found[:start]) if client.is_attached]
        return least_busy(attached or found)
