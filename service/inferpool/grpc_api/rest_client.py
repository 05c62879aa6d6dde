"""Passes requests on to a web process, as HTTP/1.1 over a Unix socket.

The web process treats such a request as one of its own clients: one place has the limits, the metrics and the
logs. A connection begins with a line that says whose requests it carries (`http.connection.forwarded`).
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias, cast

from httptools import HttpParserError, HttpResponseParser

from inferpool.errors import NotReady

Part: TypeAlias = bytes | bytearray | memoryview

MOST_IDLE: Final = 256
"""Connections without a request that are kept, for all clients together."""

_ENDED: Final = "the process that took the request has ended; try again"


class RestAnswer(NamedTuple):
    """A response.

    Attributes:
        headers: the headers, with lower-case names.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class _Lost(Exception):
    """A connection has ended; `begun` says whether a part of the response had come."""

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self.begun = begun


class RestClient:
    """The connections to the web processes, of which any may take any connection."""

    def __init__(self, address: str) -> None:
        """`address` is that of the Unix socket."""
        self._address = address
        self._idle: dict[bytes, deque[_RestConnection]] = {}
        # All idle connections, with the longest idle one first.
        self._order: OrderedDict[_RestConnection, None] = OrderedDict()

    async def ask(self, client: bytes, head: bytes, parts: Sequence[Part] = ()) -> RestAnswer:
        """Send a request and return the response.

        `client` is the line that says whose request it is, `head` has everything up to the body, which is
        `parts`. If the caller is cancelled, the connection is closed, and the web process drops the request.

        Raises NotReady if no web process answers.
        """
        connection = self._take_idle(client)
        if connection is not None:
            try:
                return await self._exchange(connection, head, parts)
            except _Lost as error:
                # A web process may close an idle connection just when a request is sent over it.
                if error.begun:
                    raise NotReady(_ENDED) from error
        try:
            connection = await self._connect(client)
            return await self._exchange(connection, head, parts)
        except (OSError, _Lost) as error:
            raise NotReady(_ENDED) from error

    def close(self) -> None:
        """Close the idle connections."""
        for connection in list(self._order):
            connection.abort()

    async def _exchange(self, connection: _RestConnection, head: bytes, parts: Sequence[Part]) -> RestAnswer:
        try:
            answer = await connection.exchange(head, parts)
        except BaseException:
            connection.abort()
            raise
        if connection.lasts:
            self._keep(connection)
        else:
            connection.abort()
        return answer

    async def _connect(self, client: bytes) -> _RestConnection:
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connecting.setblocking(False)
            # At once, or not at all if the backlog is full. uvloop itself cannot connect to abstract names.
            connecting.connect(self._address)
            _, connection = await asyncio.get_running_loop().create_unix_connection(
                lambda: _RestConnection(client, self._forget), sock=connecting
            )
        except BaseException:
            connecting.close()
            raise
        return connection

    def _take_idle(self, client: bytes) -> _RestConnection | None:
        idle = self._idle.get(client)
        if idle is None:
            return None
        # The longest idle one, so that all web processes get their shares.
        connection = idle.popleft()
        if not idle:
            del self._idle[client]
        del self._order[connection]
        return connection

    def _keep(self, connection: _RestConnection) -> None:
        self._idle.setdefault(connection.client, deque()).append(connection)
        self._order[connection] = None
        if len(self._order) > MOST_IDLE:
            next(iter(self._order)).abort()

    def _forget(self, connection: _RestConnection) -> None:
        """Take note that a connection is closed."""
        if connection in self._order:
            del self._order[connection]
            idle = self._idle[connection.client]
            idle.remove(connection)
            if not idle:
                del self._idle[connection.client]


class _RestConnection(asyncio.Protocol):
    """One connection, with one request at a time.

    Attributes:
        client: the line that says whose requests it carries.
        lasts: whether another request may follow.
    """

    def __init__(self, client: bytes, closed: Callable[[_RestConnection], None]) -> None:
        self.client = client
        self.lasts = True
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._greeting = client
        self._answer: asyncio.Future[RestAnswer] | None = None
        self._begun = False
        self._parser = HttpResponseParser(self)

    async def exchange(self, head: bytes, parts: Sequence[Part]) -> RestAnswer:
        """Send a request and wait for its response. Raises _Lost if the connection ends before."""
        if self._transport is None or self._transport.is_closing():
            raise _Lost(begun=False)
        self._answer = asyncio.get_running_loop().create_future()
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        self._begun = False
        self._transport.writelines([self._greeting + head, *parts])
        self._greeting = b""
        return await self._answer

    def abort(self) -> None:
        """Close the connection without a response."""
        self.lasts = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()
            self._closed(self)

    # From the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast("asyncio.Transport", transport)  # that of uvloop is of a class of its own

    def data_received(self, data: bytes) -> None:
        """Parse a part of the response."""
        if self._answer is None or self._answer.done():
            self.abort()  # nobody has asked for anything
            return
        self._begun = True
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request that waits."""
        self.lasts = False
        self._closed(self)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(_Lost(begun=self._begun))

    # From the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """Answer the request, unless more responses than one come for it (100 Continue)."""
        status = self._parser.get_status_code()
        if status < 200:
            return
        self.lasts = self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            self._answer.set_result(RestAnswer(status, self._headers, body))
