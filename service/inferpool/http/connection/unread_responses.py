"""Disconnects clients that do not read their responses, once the memory of these responses is needed.

As long as there is room for other requests, `SlowClientTimer` decides alone, and patiently.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, Protocol

from inferpool.http.predict.budget import ByteBudget

log = logging.getLogger(__name__)

PATIENCE_S: Final = 1.0
"""A client may leave a response unread for so long, whatever waits for its memory."""
LEAST_BYTES_A_S: Final = 256 * 1024
"""A client that reads more slowly does not read, if memory is short."""
_LOOK_S: Final = 0.05
"""Looks at all connections are at least so far apart: many requests may be refused at once."""


class Reader(Protocol):
    """A connection, as far as its unread response matters; the attributes are those of `Connection`."""

    held: Any
    transport: Any
    loop: asyncio.AbstractEventLoop
    client: str


class UnreadResponses:
    """The connections whose clients leave responses unread."""

    def __init__(self, budget: ByteBudget) -> None:
        """Make room in `budget` whenever it is short."""
        budget.make_room = self.make_room
        # The bytes that were unread at a moment, by connection.
        self._seen: dict[Reader, tuple[int, float]] = {}
        self._looked = -1.0

    def add(self, connection: Reader) -> None:
        """Take note that the response of the connection's held exchange is not read yet."""
        self._seen[connection] = (connection.transport.get_write_buffer_size(), connection.loop.time())

    def remove(self, connection: Reader) -> None:
        """Take note that the response is read, or the client gone."""
        self._seen.pop(connection, None)

    def make_room(self) -> None:
        """Count what clients have read, and disconnect those that read too slowly."""
        if not self._seen:
            return
        now = next(iter(self._seen)).loop.time()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for connection, (seen, since) in list(self._seen.items()):
            exchange, transport = connection.held, connection.transport
            if exchange is None or transport.is_closing():
                continue
            unread = transport.get_write_buffer_size()
            exchange.count_unread(unread)
            if now - since < PATIENCE_S:
                continue
            if seen - unread >= LEAST_BYTES_A_S * (now - since):
                self._seen[connection] = (unread, now)
                continue
            log.warning(
                "%s was disconnected: it left %d bytes of a response unread while memory was short",
                connection.client,
                unread,
            )
            self.remove(connection)
            transport.abort()
            exchange.lose()
