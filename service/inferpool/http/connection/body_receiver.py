"""Receives large bodies from the socket straight into the memory in which their tensors stay.

Usually each byte is copied from the kernel to the loop, from there to the parser, by the parser to a chunk,
and from the chunk to its memory. Here each byte is copied once. The parser is not needed: its request's body
is all that follows until the body is complete.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

LEAST_RECEIVED_BYTES: Final = 128 * 1024
"""For a shorter rest of a body, changing the way in which bytes are received does not pay."""
_HEAD_BYTES: Final = 16 * 1024
"""Bytes that are read at first, between large bodies: enough for a head, with little of a body behind it."""


class BodyReceiverOwner(Protocol):
    """The protocol of the connection."""

    def data_received(self, data: bytes) -> None:
        """Take bytes that are not of a large body."""

    def body_advanced(self, size: int) -> None:
        """Take note that `size` more bytes of a large body are in its memory."""

    def body_completed(self) -> None:
        """Take note that a large body is complete: what follows is another request."""

    def eof_received(self) -> bool | None:
        """Take note that the client sends nothing more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note that the connection is lost."""

    def pause_writing(self) -> None:
        """Take note that the client does not read."""

    def resume_writing(self) -> None:
        """Take note that the client reads again."""


class BodyReceiver(asyncio.BufferedProtocol):
    """Takes the place of `owner` at its transport, from the connection's first large body on."""

    def __init__(self, owner: BodyReceiverOwner) -> None:
        self._owner = owner
        self._head = memoryview(bytearray(_HEAD_BYTES))
        self._memory: memoryview | None = None
        self._missing_bytes = 0

    def fill(self, memory: memoryview) -> None:
        """Receive into `memory` until it is full."""
        self._memory = memory
        self._missing_bytes = len(memory)

    def discard(self) -> None:
        """Free the memory of the body, and only count the bytes that still follow: they are of no use."""
        self._memory = None

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return memory for the next bytes."""
        if not self._missing_bytes:
            return self._head
        return (
            self._head[: self._missing_bytes]
            if self._memory is None
            else self._memory[-self._missing_bytes :]
        )

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on `nbytes` bytes, which are in the memory that `get_buffer` returned."""
        if not self._missing_bytes:
            self._owner.data_received(self._head[:nbytes].tobytes())
            return
        self._missing_bytes -= nbytes
        self._owner.body_advanced(nbytes)
        if not self._missing_bytes:
            self._memory = None
            self._owner.body_completed()

    def eof_received(self) -> bool | None:
        """Pass the call on."""
        return self._owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Free the memory, and pass the call on."""
        self._memory = None
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass the call on."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Pass the call on."""
        self._owner.resume_writing()
