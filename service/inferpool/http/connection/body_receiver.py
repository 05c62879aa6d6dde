"""Large bodies, read from their connection straight into where they are to lie.

Else each byte is copied from the system to the loop, from there to the parser, by it to a piece of the body
and from that to its place; here, once. The parser is left out: nothing but the body comes until it is full.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

LEAST_FILLED: Final = 128 * 1024
"""For less than this it does not pay to change the way that bytes come in."""
_HEAD_BYTES: Final = 16 * 1024
"""So much is read at first where another large body is expected: its head, and little behind it."""


class BodyReceiverOwner(Protocol):
    """The connection whose bytes go to bodies."""

    def data_received(self, data: bytes) -> None:
        """Bytes of no large body have come."""

    def came(self, size: int) -> None:
        """`size` bytes more of a large body are in their place."""

    def full(self) -> None:
        """All of them are: what follows is no body any more."""

    def eof_received(self) -> bool | None:
        """The client sends no more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""

    def pause_writing(self) -> None:
        """The client does not read."""

    def resume_writing(self) -> None:
        """It reads again."""


class BodyReceiver(asyncio.BufferedProtocol):
    """Stands in for `connection` with its transport from its first large body on."""

    def __init__(self, connection: BodyReceiverOwner) -> None:
        self._connection = connection
        self._head = memoryview(bytearray(_HEAD_BYTES))
        self._room: memoryview | None = None
        self._left = 0

    def fill(self, room: memoryview) -> None:
        """What comes next goes to `room`, until that is full."""
        self._room = room
        self._left = len(room)

    def throw_away(self) -> None:
        """The rest of the body is of no use: its place is let go of, and what still comes is only counted."""
        self._room = None

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if not self._left:
            return self._head
        return self._head[: self._left] if self._room is None else self._room[-self._left :]

    def buffer_updated(self, nbytes: int) -> None:
        """They are there."""
        if not self._left:
            self._connection.data_received(self._head[:nbytes].tobytes())
            return
        self._left -= nbytes
        self._connection.came(nbytes)
        if not self._left:
            self._room = None
            self._connection.full()

    def eof_received(self) -> bool | None:
        """As without this."""
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As without this."""
        self._room = None
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """As without this."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """As without this."""
        self._connection.resume_writing()
