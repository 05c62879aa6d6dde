"""Closes connections whose clients stand still, send too slowly, or do not read.

This module is not compiled: tests shorten its times.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import termios
from collections.abc import Callable
from typing import Final

from inferpool.http.connection.connection import Connection

STALLED_S: Final = 60.0
_AGAIN_S: Final = 0.05
"""Pause before a connection is looked at again whose client has sent something just now."""
LEAST_BYTES: Final = 64 * 1024
"""A client that sends or reads fewer bytes than this in `STALLED_S` seconds, and is not done, is too slow."""


class SlowClientTimer:
    """Watches the client of one connection.

    Sending is watched in windows of `STALLED_S` seconds: a request is too slow if any window, the first or a
    later one, brings too few bytes. So a request costs nothing but the beginning of its window, and bytes
    cost nothing but counting them.

    Attributes:
        received_bytes: bytes that were received, of all requests.
    """

    def __init__(self, connection: Connection, keep_alive_s: float, refuse_slow: Callable[[], None]) -> None:
        """Close an idle connection after `keep_alive_s` seconds; call `refuse_slow` for a slow request."""
        self.received_bytes = 0
        self._connection = connection
        self._keep_alive_s = keep_alive_s
        self._refuse_slow: Callable[[], None] | None = refuse_slow
        self._window_began = 0.0
        self._window_bytes = 0
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch the client: a first request is to follow as soon as one on an idle connection."""
        self._sending = self._connection.loop.call_later(self._keep_alive_s, self._check_sending)

    def stop(self) -> None:
        """Watch no longer: the connection is lost."""
        self.client_reads()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        self._refuse_slow = None  # a cycle of references would stay until the garbage collector runs

    def begin_window(self, now: float) -> None:
        """Begin a window: a request begins, or the server has kept the client from sending."""
        self._window_began = now
        self._window_bytes = self.received_bytes

    def watch_reading(self) -> None:
        """Abort the connection if its client reads fewer than `LEAST_BYTES` in any `STALLED_S` seconds."""
        transport = self._connection.transport
        unread = transport.get_write_buffer_size()

        def check() -> None:
            if transport.get_write_buffer_size() > unread - LEAST_BYTES:
                transport.abort()
            else:
                self.watch_reading()

        self._reading = self._connection.loop.call_later(STALLED_S, check)

    def client_reads(self) -> None:
        """Stop watching whether the client reads."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def watch_closing(self) -> None:
        """Abort the connection, which is closing, if its client never reads the rest of the responses.

        The transport waits for that without end, and says nothing of a rest that is small.
        """
        if self._reading is None and self._connection.transport.get_write_buffer_size():
            self.watch_reading()

    def _check_sending(self) -> None:
        """Close the connection if nothing was received for the keep-alive time, or too little of a request.

        The keep-alive time holds between requests and within one. A client that stops in the middle of a
        request, or sends it in drops, holds a connection and the memory of what it has sent.
        """
        connection = self._connection
        now = connection.loop.time()
        answering = connection.between_requests and connection.current is not None
        since = connection.idle_since
        if since is None and not answering and not connection.is_read_paused():
            since = connection.last_received
        left_s = self._keep_alive_s
        if since is not None:
            left_s += since - now
        window_s = self._window_left_s(now)
        if left_s > 0 and window_s > 0:
            self._sending = connection.loop.call_later(min(left_s, window_s), self._check_sending)
        elif left_s > 0:
            if self._refuse_slow is not None:
                self._refuse_slow()
            self.watch_closing()
        elif not connection.between_requests:
            connection.transport.abort()
        elif self._has_sent():
            # The event loop has not read it yet: it was kept busy, and timers are looked at first.
            self._sending = connection.loop.call_later(_AGAIN_S, self._check_sending)
        else:
            if not connection.transport.is_closing():
                connection.transport.close()
            self.watch_closing()

    def _has_sent(self) -> bool:
        """Return whether the client has sent something that nobody has read."""
        connection = self._connection
        if connection.reading_ended or connection.transport.is_closing():
            return False
        unread = bytearray(4)
        try:
            fcntl.ioctl(connection.descriptor, termios.FIONREAD, unread)
        except OSError:
            return False
        return any(unread)

    def _window_left_s(self, now: float) -> float:
        """Return the seconds until the request that is being received may be found too slow; 0 if it is."""
        connection = self._connection
        if connection.between_requests:
            return math.inf
        receiving = None if connection.in_head else connection.last
        if connection.is_read_paused() or connection.current not in (None, receiving):
            # The server keeps the client from sending, or an earlier request is answered whatever this one
            # does.
            self.begin_window(now)
            return STALLED_S
        left_s = self._window_began + STALLED_S - now
        if left_s <= 0 and self.received_bytes - self._window_bytes >= LEAST_BYTES:
            self.begin_window(now)
            return STALLED_S
        return max(0.0, left_s)
