"""The handshake of a TLS connection. The connection has a protocol only once the handshake is complete."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from inferpool.http.connection.tls_records import TlsRecords
from inferpool.http.connection.tls_transport import SHUTDOWN_S, TlsTransport


class TlsHandshake(asyncio.Protocol):
    """The protocol of a TCP transport until the handshake is complete.

    Attributes:
        complete: is done when the protocol of the connection has its transport. Raises ssl.SSLError if the
            handshake has failed, which the client learns by `end`, and ConnectionError if the client is gone.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, context: ssl.SSLContext, make_protocol: Callable[[], Any]
    ) -> None:
        self.complete: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._make_protocol = make_protocol
        self._records = TlsRecords(context)
        self._transport: Any = None
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the TCP transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Go on with the handshake."""
        if self._is_over:
            return
        self._records.feed(data)
        try:
            is_complete = self._records.shake_hands()
        except ssl.SSLError as error:
            self._give_up(error)
            return
        if output := self._records.output():
            self._transport.write(output)
        if is_complete:
            self._is_over = True
            transport = TlsTransport(self._transport, self._records, self._make_protocol(), self._loop)
            self._transport.set_protocol(transport)
            transport.begin()
            if not self.complete.done():
                self.complete.set_result(None)

    def eof_received(self) -> None:
        """Close the connection: no client ends its side before it has sent a request."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note that the client is gone."""
        self._give_up(exc or ConnectionResetError("the client has closed the connection"))

    def end(self, response: bytes | None = None) -> None:
        """Close the connection, after `response`, or else after what OpenSSL says about the failure."""
        self._is_over = True
        data = self._records.output() if response is None else response
        if data and not self._transport.is_closing():
            self._transport.write(data)
        self._transport.close()
        self._loop.call_later(SHUTDOWN_S, self._transport.abort)

    def _give_up(self, error: Exception) -> None:
        self._is_over = True
        if not self.complete.done():
            self.complete.set_exception(error)
