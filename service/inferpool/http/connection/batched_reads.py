"""Reads from many connections in one call, during which other threads run.

The event loop reads from one connection after the other, and takes and gives back the GIL for each. Only
connections that send one small, complete request at a time are read here. A connection returns to the event
loop when it pipelines, sends part of a request, or ends.

The bytes go past the transport of a connection. The transport of a TLS connection decrypts them here.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from inferpool.http.connection.connection import Connection
from inferpool.http.connection.fast_path import try_cached_head
from inferpool.http.connection.tls_transport import TlsTransport

try:
    from select import EPOLLIN, epoll

    from inferpool.http.connection import _socketio
except ImportError:  # there was no C compiler at installation, or the system is not Linux
    _socketio = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

MOST_READ_BYTES: Final = 8 * 1024
"""Bytes that are read from a connection at a time. Connections with larger requests do not join."""
LEAST_IN_FLIGHT: Final = 4
"""With fewer requests in flight, reading in batches gains nothing."""
_LOOP_BYTES: Final = 256 * 1024
"""Bytes that uvloop reads at a time."""
_BUFFER_BYTES: Final = 64 * MOST_READ_BYTES
"""Memory for as many connections as the C module reads in one call; the next call reads the others."""


class ReadBatcher:
    """Reads for connections of one event loop."""

    def __init__(self, least_in_flight: int = LEAST_IN_FLIGHT) -> None:
        """Let connections join while at least `least_in_flight` requests are in flight.

        A connection that is read alone leaves while there are fewer than half of them.
        """
        self._least_in_flight = least_in_flight
        self._connections: dict[int, Connection] = {}
        self._buffer = bytearray(_BUFFER_BYTES)
        self._poll: epoll | None = None
        # Not typed, because compiled code checks the types of results, and uvloop returns its own.
        self._loop: Any = None

    def join(self, connection: Connection, request_bytes: int) -> None:
        """Read for `connection` from now on, if that gains anything; its last request had `request_bytes`."""
        if (
            connection.batched
            or connection.shared.predictor.in_flight.requests < self._least_in_flight
            or request_bytes > MOST_READ_BYTES
        ):
            return
        if connection.descriptor < 0 or _socketio is None:
            return
        if connection.tls is not None and connection.tls.has_content():
            return  # no further bytes need to come for that
        try:
            if self._poll is None:
                self._begin(connection.loop)
            assert self._poll is not None
            self._poll.register(connection.descriptor, EPOLLIN)
        except OSError:
            return  # there are no more descriptors, or the system watches as many as it may
        connection.transport.pause_reading()
        self._connections[connection.descriptor] = connection
        connection.batched = True

    def leave(self, connection: Connection) -> None:
        """Let the event loop read for `connection` again; does nothing if the connection has not joined."""
        if not connection.batched or self._poll is None:
            return
        connection.batched = False
        del self._connections[connection.descriptor]
        self._poll.unregister(connection.descriptor)
        connection.resume_reading()

    def close(self) -> None:
        """Let all connections leave, and close the epoll descriptor."""
        for connection in list(self._connections.values()):
            self.leave(connection)
        if self._poll is not None and self._loop is not None:
            self._loop.remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = self._loop = None

    def _begin(self, loop: Any) -> None:
        poll = epoll()
        try:
            loop.add_reader(poll.fileno(), self._read)
        except BaseException:
            poll.close()
            raise
        self._poll, self._loop = poll, loop

    def _read(self) -> None:
        if self._poll is None:
            return
        try:
            arrivals = _socketio.receive(self._poll.fileno(), self._buffer, MOST_READ_BYTES)
        except MemoryError:
            # Bytes that were read are lost, and nobody knows from which connections.
            for any_connection in list(self._connections.values()):
                any_connection.transport.abort()
            return
        now = self._loop.time()
        alone = len(arrivals) == 1
        for descriptor, data in arrivals:
            connection = self._connections.get(descriptor)
            if connection is None:
                continue
            try:
                if data is None or connection.transport.is_closing():
                    # The event loop finds out itself whether it is the end of the stream or an error.
                    self.leave(connection)
                    continue
                if alone and 2 * connection.shared.predictor.in_flight.requests + 2 < self._least_in_flight:
                    self.leave(connection)
                tls = connection.tls
                if tls is not None:
                    self._read_encrypted(connection, tls, _with_rest(descriptor, data), now)
                elif not try_cached_head(connection, data, now):
                    self._pass_on(connection, descriptor, data)
            except Exception:
                # The other connections must be read all the same.
                log.exception("a request could not be read")
                connection.transport.abort()

    def _read_encrypted(self, connection: Connection, tls: TlsTransport, data: bytes, now: float) -> None:
        """Answer the request in the records that `data` completes."""
        content = tls.decrypt(data)
        if content and connection.owner is not None and not try_cached_head(connection, content, now):
            connection.owner.data_received(content)
        if not content or not connection.between_requests or connection.is_read_paused():
            self.leave(connection)
        if tls.has_ended():
            self.leave(connection)
            tls.deliver()

    def _pass_on(self, connection: Connection, descriptor: int, data: bytes) -> None:
        """Give the parser what is not one complete request with a cached head."""
        if connection.owner is None:
            return
        connection.owner.data_received(_with_rest(descriptor, data))
        if not connection.between_requests or connection.is_read_paused():
            self.leave(connection)


def _with_rest(descriptor: int, data: bytes) -> bytes:
    """Return `data` and what else can be read, as much as the event loop would read.

    The kernel resets a connection that is closed with unread bytes, and the client may lose its response.
    """
    if len(data) < MOST_READ_BYTES:
        return data
    try:
        return data + os.read(descriptor, _LOOP_BYTES)
    except OSError:  # nothing to read, or an error that the event loop finds itself
        return data
