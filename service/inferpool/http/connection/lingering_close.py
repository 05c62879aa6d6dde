"""Closes a connection whose client may still send, without costing the client its last response.

The client gets the end of the stream at once. What it still sends is read now and then, and dropped. So a
client that sends all before it reads gets to its response, and a client that sends again at once is slowed.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

PAUSE_S: Final = 0.1
MOST_S: Final = 3.0
MOST_BYTES: Final = 16 * 2**20
"""A client that sends for longer, or more, is reset."""
_READ_BYTES: Final = 1024 * 1024
_buffer: Final = bytearray(_READ_BYTES)
"""Memory for what is dropped, the same for all connections."""


class LingeringClose:
    """The end of one connection, whose transport does not read any more and has a response to write."""

    def __init__(
        self, transport: asyncio.Transport, descriptor: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport = transport
        self._descriptor = descriptor
        self._loop = loop
        self._ends = loop.time() + MOST_S
        self._bytes = 0

    def start(self) -> None:
        """Read in a moment, and close the connection at the end of the stream."""
        self._loop.call_later(PAUSE_S, self._read)

    def _read(self) -> None:
        if self._transport.is_closing():
            return
        try:
            size = os.readv(self._descriptor, [_buffer])
        except BlockingIOError:
            size = -1
        except OSError:
            self._transport.abort()
            return
        if not size:
            self._transport.close()
            return
        self._bytes += max(0, size)
        if self._bytes > MOST_BYTES or (
            self._loop.time() > self._ends and not self._transport.get_write_buffer_size()
        ):
            self._transport.abort()
        else:
            self.start()
