"""Writes to a TLS connection as fast as its client reads.

The TLS layer of the event loop encrypts what it is given at once, and the encrypted bytes wait below it.
Nothing counts them there: a large response would be in memory twice, and its client would seem to have read
it. So this transport gives the TLS layer one piece after the other.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from collections import deque
from typing import Any, Final, Protocol

PIECE_BYTES: Final = 64 * 1024
"""Bytes that the TLS layer is given at a time."""
SHUTDOWN_S: Final = 3.0
"""How long a client may take to end its side, after the server has ended its own."""
_LOOK_S: Final = 0.05
_MOST_LOOKS: Final = 1200
"""Looks, in a minute, whether a client has read the end of a response; then the connection is aborted."""


class Writer(Protocol):
    """The protocol of the connection."""

    def writing_paused(self) -> None:
        """Take note that the client does not read as fast as is written."""

    def writing_resumed(self) -> None:
        """Take note that the client has read nearly everything."""


class TlsTransport(asyncio.Transport):
    """Stands between a protocol and the transport of the TLS layer.

    Attributes:
        lingers: whether the client may still send, and must not be reset before it has read its response.
    """

    def __init__(self, transport: Any, writer: Writer, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.lingers = False
        self._transport = transport
        self._writer = writer
        self._loop = loop
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._is_full = self._is_told = self._is_closing = False
        self._looks = 0
        transport.set_write_buffer_limits(high=PIECE_BYTES // 2, low=0)

    # From the protocol.

    def write(self, data: Any) -> None:
        """Write `data` as soon as the client has read what was written before."""
        if self._is_closing:
            return
        if not self._is_full and len(data) <= PIECE_BYTES:
            self._transport.write(data)
            return
        self._waiting.append(memoryview(data))
        self._waiting_bytes += len(data)
        self._pass_on()

    def get_write_buffer_size(self) -> int:
        """Return the bytes that are not with the kernel yet, but for about two pieces."""
        return self._waiting_bytes + int(self._transport.get_write_buffer_size())

    def close(self) -> None:
        """End the connection once everything is written."""
        self._is_closing = True
        if not self._waiting:
            self._close_when_read()

    def abort(self) -> None:
        """End the connection at once."""
        self._is_closing = True
        self._forget()
        self._transport.abort()

    def is_closing(self) -> bool:
        """Return whether the connection ends."""
        return self._is_closing or bool(self._transport.is_closing())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the transport of the TLS layer knows."""
        return self._transport.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Pass the call on."""
        self._transport.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Pass the call on."""
        protocol: asyncio.BaseProtocol = self._transport.get_protocol()
        return protocol

    def is_reading(self) -> bool:
        """Pass the call on."""
        return bool(self._transport.is_reading())

    def pause_reading(self) -> None:
        """Pass the call on."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Pass the call on."""
        self._transport.resume_reading()

    def can_write_eof(self) -> bool:
        """Return False: TLS has no half of a connection."""
        return False

    # From the TLS layer, by way of the protocol.

    def filled(self) -> None:
        """Take note that the TLS layer has more than the client reads."""
        self._is_full = True
        if not self._is_told:
            self._is_told = True
            self._writer.writing_paused()

    def emptied(self) -> None:
        """Take note that the TLS layer has nothing more to write."""
        self._is_full = False
        self._pass_on()
        if self._waiting or self._is_full:
            return
        if self._is_told:
            self._is_told = False
            self._writer.writing_resumed()
        if self._is_closing:
            self._close_when_read()

    def lose(self) -> None:
        """Forget what is not written: the connection is lost."""
        self._is_closing = True
        self._forget()

    def _forget(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0

    def _pass_on(self) -> None:
        while self._waiting and not self._is_full:
            data = self._waiting.popleft()
            if len(data) > PIECE_BYTES:
                self._waiting.appendleft(data[PIECE_BYTES:])
                data = data[:PIECE_BYTES]
            self._waiting_bytes -= len(data)
            self._transport.write(data)

    def _close_when_read(self) -> None:
        """Close the transport below, whose patience is short, once the client has read nearly everything."""
        if self._transport.is_closing():
            return
        self._looks += 1
        if self._looks > _MOST_LOOKS:
            self._transport.abort()
        elif self._unread_bytes() > PIECE_BYTES // 4:
            self._loop.call_later(_LOOK_S, self._close_when_read)
        else:
            self._transport.close()
            if not self.lingers:
                self._loop.call_later(_LOOK_S, self._abort_when_read)

    def _abort_when_read(self) -> None:
        """End the connection without waiting for the client, which has everything.

        Clients with an idle connection notice the end when they use it the next time.
        """
        if self._unread_bytes():
            self._loop.call_later(_LOOK_S, self._abort_when_read)
        else:
            self._transport.abort()

    def _unread_bytes(self) -> int:
        """Return the bytes that the client's machine has not acknowledged."""
        unread = bytearray(4)
        try:
            fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, unread)
        except (OSError, ValueError, AttributeError):
            return 0  # the connection is gone
        return int.from_bytes(unread, sys.byteorder) + int(self._transport.get_write_buffer_size())
