"""Accepts connections so that several processes with one listening socket get equal shares of them.

The kernel wakes all processes that wait for a connection, and the first one takes it. A process that accepts
all it can get then has most connections: with four processes up to 63 of 64, and with SO_REUSEPORT up to 27.
So each process accepts one connection at a time, and leaves it to the others for a moment if it has more than
one of them. Connections that wait belong to nobody: they survive the death of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from inferpool.http.access.tls import LOOK_S, Certificates
from inferpool.http.connection.tls_handshake import TlsHandshake
from inferpool.observe.metrics import Metrics
from inferpool.pool.log_limits import LogLimiter
from inferpool.system.connection_counts import ConnectionCounts
from inferpool.system.listeners import client_address

log = logging.getLogger(__name__)

LEAVE_S: Final = 0.001
"""How long a connection is left to a process that has one connection fewer."""
MOST_LEAVE_S: Final = 0.01
"""How long a connection is left to other processes at most. They may be busy, or stopped."""
PAUSE_S: Final = 1.0
"""Pause after the process has run out of descriptors or memory."""
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


MOST_HANDSHAKES: Final = 512
"""TLS handshakes at once in one process. With more, the oldest is given up, or no connection is accepted."""
HANDSHAKE_S: Final = 10.0
"""How long a TLS handshake may take."""
SPARED_S: Final = 1.0
"""A younger handshake is not given up: its client may be as fast as it can."""
_PLAIN_RESPONSE: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_USE_HTTPS: Final = b"this port takes HTTPS, and the request came as plain HTTP; ask for https://\n"


class AcceptedConnection(Protocol):
    """The protocol of a connection, as the acceptor sees it.

    Attributes:
        ended: what is called when the connection is lost.
    """

    ended: Callable[[], None] | None


class _Entered:
    """A connection that is counted for its client's address."""

    def __init__(self, counts: ConnectionCounts, counter: int) -> None:
        self._counts = counts
        self._counter = counter

    def leave(self) -> None:
        """Count the connection no longer."""
        if self._counter >= 0:
            self._counts.leave(self._counter)
            self._counter = -1


class Acceptor:
    """Accepts the connections of a listening socket, in place of an `asyncio.Server`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        make_protocol: Callable[[], Any],
        count: Callable[[], int],
        counts: ConnectionCounts,
        metrics: Metrics,
        certificates: Certificates | None = None,
        most_per_address: int = 0,
    ) -> None:
        """Begin to accept, with TLS if there are `certificates`.

        `count` tells how many connections there are in this process, `make_protocol` makes an
        `AcceptedConnection`. 0 for `most_per_address` sets no limit. Refused connections are counted in
        `metrics`.
        """
        listener.setblocking(False)
        self._loop = loop
        self._listener = listener
        self._file = listener.fileno()
        self._make_protocol = make_protocol
        self._count = count
        self._counts = counts
        self._certificates = certificates
        self._most_per_address = most_per_address
        self._over_limit = metrics.value("refused_connections_total", "address_limit")
        self._failed_handshakes = metrics.value("refused_connections_total", "handshake")
        self._starting: dict[asyncio.Task[Any], tuple[socket.socket, float]] = {}
        self._log_limiter = LogLimiter(loop.time)
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._closed = False
        self.update()
        loop.add_reader(self._file, self._ready)
        if certificates is not None:
            self._look = loop.call_later(LOOK_S, self._look_at_certificates)

    def close(self) -> None:
        """Accept no more; connections that wait are left to other processes."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._file)
            for timer in (self._timer, self._look):
                if timer is not None:
                    timer.cancel()

    async def wait_closed(self) -> None:
        """Do nothing: `close` does not wait for anything."""

    def update(self) -> None:
        """Tell the other processes how many connections there are here."""
        self._counts.set(self._count() + len(self._starting))

    def _ready(self) -> None:
        self.update()
        if lead := self._counts.lead():
            self._leave(min(MOST_LEAVE_S, LEAVE_S * lead))
        elif len(self._starting) >= MOST_HANDSHAKES and not self._give_up_oldest():
            self._leave(MOST_LEAVE_S)
        else:
            self._accept()

    def _leave(self, seconds: float) -> None:
        """Leave connections to other processes for `seconds`; then take one that still waits."""
        self._loop.remove_reader(self._file)
        self._timer = self._loop.call_later(seconds, self._return)

    def _return(self) -> None:
        self._loop.add_reader(self._file, self._ready)
        if len(self._starting) < MOST_HANDSHAKES:
            self._accept()

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was faster, or the client is gone
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            log.error("no connection can be accepted for %g s: %s", PAUSE_S, error.strerror)
            self._leave(PAUSE_S)
            return
        connection.setblocking(False)
        entered: _Entered | None = None
        if self._most_per_address and isinstance(address, tuple):
            client = _counted_address(client_address(address))
            counter = self._counts.enter(client, self._most_per_address)
            if counter < 0:
                connection.close()
                self._over_limit.add()
                self._report(
                    "%s has %d connections, and more are closed; see --connections-per-address",
                    client,
                    self._most_per_address,
                )
                return
            entered = _Entered(self._counts, counter)
        client = client_address(address) or "a client"
        starting = self._loop.create_task(self._start(connection, client, entered))
        self._starting[starting] = (connection, self._loop.time())
        starting.add_done_callback(self._started)
        self.update()

    def _started(self, starting: asyncio.Task[Any]) -> None:
        self._starting.pop(starting, None)
        self.update()

    def _make_counted(self, entered: _Entered | None) -> Any:
        protocol = self._make_protocol()
        protocol.ended = partial(self._left, entered)
        return protocol

    def _left(self, entered: _Entered | None) -> None:
        if entered is not None:
            entered.leave()
        self.update()

    async def _start(self, connection: socket.socket, client: str, entered: _Entered | None) -> None:
        make_protocol = partial(self._make_counted, entered)
        try:
            if self._certificates is None:
                await self._loop.connect_accepted_socket(make_protocol, connection)
            else:
                await self._shake_hands(make_protocol, connection, client, self._certificates.context)
        except OSError:
            connection.close()  # the client is gone
            if entered is not None:
                entered.leave()

    async def _shake_hands(
        self,
        make_protocol: Callable[[], Any],
        connection: socket.socket,
        client: str,
        context: ssl.SSLContext,
    ) -> None:
        handshake = TlsHandshake(self._loop, context, make_protocol)
        await self._loop.connect_accepted_socket(lambda: handshake, connection)
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await handshake.complete
        except TimeoutError:
            self._failed_handshakes.add()
            self._report("a TLS handshake with %s was not finished in time", client)
            handshake.end()
            raise
        except ssl.SSLError as error:
            self._failed_handshakes.add()
            handshake.end(self._explain(error, client))
            raise

    def _explain(self, error: ssl.SSLError, client: str) -> bytes | None:
        """Tell the log why a handshake has failed, and return a response if the client sent plain HTTP."""
        if error.reason == "HTTP_REQUEST":
            self._report("%s sent plain HTTP, and this port takes HTTPS; ask for https://", client)
            return _PLAIN_RESPONSE % (len(_USE_HTTPS), _USE_HTTPS)
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            self._report(
                "%s has shown no certificate; clients need one that an authority in --tls-client-ca-file has"
                " signed",
                client,
            )
        else:
            reason = (error.reason or "").lower().replace("_", " ")
            self._report("a TLS handshake with %s has failed: %s", client, reason)
        return None

    def _report(self, text: str, *arguments: Any) -> None:
        """Log a refusal, unless one of the same kind was logged a moment ago."""
        if self._log_limiter.suppressed(text) is not None:
            log.warning(text, *arguments)

    def _give_up_oldest(self) -> bool:
        """End the oldest handshake; False if it may still become a connection soon."""
        starting, (connection, began) = next(iter(self._starting.items()))
        if self._loop.time() - began < SPARED_S:
            return False
        del self._starting[starting]
        self._failed_handshakes.add()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        self._report("more than %d TLS handshakes are not finished; the oldest are given up", MOST_HANDSHAKES)
        return True

    def _look_at_certificates(self) -> None:
        assert self._certificates is not None
        self._certificates.look()
        self._look = self._loop.call_later(LOOK_S, self._look_at_certificates)


def _counted_address(text: str) -> str:
    """The part of an address that one client has to itself: of IPv6, whose clients have networks, 64 bits."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.IPv6Network((address, 64), strict=False))
