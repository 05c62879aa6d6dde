"""uvicorn's HTTP protocol, which answers predictions itself, below ASGI.

A request for a prediction becomes an `Exchange`, which the callbacks of the parser drive. A request whose
head is cached does not even need the parser. All other requests go to the application as usual. Both kinds
share connections, pipelining, keep-alive and shutdown, which stay uvicorn's.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

import uvicorn
from httptools import HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from inferpool.errors import MalformedBody, TooSlow
from inferpool.http.asgi import FOLLOWS, find_api
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.body_receiver import BodyReceiver
from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange import Exchange
from inferpool.http.connection.fast_path import try_cached_head
from inferpool.http.connection.shared import SharedState
from inferpool.http.connection.slow_client import SlowClientTimer
from inferpool.http.predict.api import InferenceApi, Target
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_head import RequestHead

MOST_HEAD_BYTES: Final = 64 * 1024
"""A request line and headers with more bytes than this are refused with 431."""

_UPGRADE: Final = (
    "the request asks to upgrade to another protocol, so its body cannot be found; send it without Upgrade"
)

_TOO_LARGE_HEAD: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)
_TOO_SLOW: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class PredictProtocol(HttpToolsProtocol):
    """One connection, as its transport and uvicorn see it."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        application: Any = config.loaded_app
        shared: SharedState = application.shared
        # First, because uvicorn's `__init__` sets `cycle`.
        self.connection = Connection(self, shared, _loop or asyncio.get_running_loop(), server_state)
        super().__init__(config, server_state, app_state, _loop)
        self._clock = shared.predictor.clock
        self._read_batcher: ReadBatcher = application.read_batcher
        self._slow_client = SlowClientTimer(self.connection, self.timeout_keep_alive, self._refuse_slow)
        self._body_receiver: BodyReceiver | None = None
        self._chunks: list[bytes] = []
        self._parsed_something = False
        self._upgraded = False

    @property
    def cycle(self) -> Any:
        """The last request that was received; the name is uvicorn's."""
        return self.connection.last

    @cycle.setter
    def cycle(self, cycle: Any) -> None:
        self.connection.last = cycle

    # From the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the transport of a client that has connected."""
        super().connection_made(transport)
        self.connection.made(transport, self.flow, self.pipeline)
        self._slow_client.start()

    def data_received(self, data: bytes) -> None:
        """Answer a request whose head is cached; feed everything else to the parser, which calls back."""
        if self._upgraded:
            return  # the parser stopped at the head: what follows may be the body or a request
        connection = self.connection
        now = self.loop.time()
        if try_cached_head(connection, data, now):
            self._read_batcher.join(connection, len(data))
            return
        connection.last_received = now
        if not connection.between_requests:
            connection.idle_since = None
        begins = connection.between_requests and connection.current is None
        self._slow_client.received_bytes += len(data)
        self._parsed_something = False
        super().data_received(data)
        body = self._chunks[0] if len(self._chunks) == 1 else None
        self._chunks.clear()  # an idle connection must not keep them: nothing counts them any more
        cycle = connection.last
        if isinstance(cycle, Exchange):
            if connection.between_requests:
                if begins and body is not None:
                    cycle.remember_head(data, body)
            elif not connection.in_head and (memory := cycle.memory()) is not None:
                connection.unparsed_bytes = 0
                self._receive_body(memory)
                return
        # Bytes that complete neither a head nor a chunk of a body are those of a head, or of trailers.
        connection.unparsed_bytes = 0 if self._parsed_something else connection.unparsed_bytes + len(data)
        if connection.unparsed_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE_HEAD)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request that is being answered, and those behind it."""
        connection = self.connection
        self._read_batcher.leave(connection)
        self._slow_client.stop()
        if connection.current is not None and not isinstance(connection.current, Exchange):
            # uvicorn tells only the last request that the client is gone, and this one may not be the last.
            connection.current.disconnected = True
            connection.current.message_event.set()
        exchanges = [connection.current, *(queued for queued, _ in self.pipeline)]
        if isinstance(connection.last, Exchange):
            connection.last = None  # uvicorn would set attributes that only its own cycles have
        super().connection_lost(exc)
        for exchange in exchanges:
            if isinstance(exchange, Exchange):
                exchange.lose()
        self.pipeline.clear()
        self._body_receiver = None
        connection.lose()

    def pause_writing(self) -> None:
        """Take note that the client does not read: the application waits before it sends more."""
        super().pause_writing()
        self.connection.write_paused = True
        if not isinstance(self.connection.current, Exchange):  # an exchange says itself when it has to wait
            self.watch_reading()

    def resume_writing(self) -> None:
        """Take note that the client reads again: the next request on the connection may have its turn."""
        super().resume_writing()
        self._slow_client.client_reads()
        self.connection.resume_writing()

    # From the body receiver.

    def _receive_body(self, memory: memoryview) -> None:
        if self._body_receiver is None:
            self._body_receiver = BodyReceiver(self)
            self.transport.set_protocol(self._body_receiver)
        self._body_receiver.fill(memory)

    def body_advanced(self, size: int) -> None:
        """Count bytes of a large body, which are in its memory."""
        self.connection.last_received = self.loop.time()
        self.connection.idle_since = None
        self._slow_client.received_bytes += size
        if not cast("Exchange", self.cycle).receive(size, None) and self._body_receiver is not None:
            self._body_receiver.discard()

    def body_completed(self) -> None:
        """End a large body: what follows is for a new parser, because the old one still expects the body."""
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets them
        self.connection.between_requests = True
        cast("Exchange", self.cycle).end_body()

    # From the parser.

    def on_message_begin(self) -> None:
        """Begin a request; what only the application needs is made when the head is complete."""
        self.connection.between_requests = False
        self.connection.in_head = True
        self.connection.idle_since = None
        self._slow_client.begin_window(self.connection.last_received)
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Make an exchange of a prediction, and give every other request to the application."""
        self._parsed_something = True
        self.connection.in_head = False
        self._upgraded = self.parser.should_upgrade()
        found = self._find_api()
        if found is None:
            url, headers, expect = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.headers, self.expect_100_continue = url, headers, expect
            self.scope["headers"] = headers
            super().on_headers_complete()
            if self._upgraded:
                self.cycle.keep_alive = False
            return
        exchange = self._exchange(*found)
        self.cycle = exchange
        if self.connection.current is None:
            self.connection.current = exchange
            exchange.start()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        """Pass on a chunk of the body."""
        self._parsed_something = True
        self._chunks.append(body)
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            cycle.receive(len(body), body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Take note that the request is complete."""
        self.connection.between_requests = self._parsed_something = True
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            cycle.end_body()
        else:
            super().on_message_complete()

    # From the connection, its timer, and uvicorn's cycles.

    def on_response_complete(self) -> None:
        """Take note that the application's response is with the transport."""
        self.connection.completed()

    def next_exchange(self) -> None:
        """Begin the turn of the next pipelined request."""
        super().on_response_complete()

    def watch_reading(self) -> None:
        """Abort the connection if its client stops reading."""
        self._slow_client.watch_reading()

    def _refuse_slow(self) -> None:
        """Respond to a request that is received too slowly, if nothing was responded yet, and close."""
        cycle: Any = self.cycle
        if self.connection.in_head or not isinstance(cycle, Exchange):
            if self.connection.in_head or not cycle.response_started:
                self.transport.write(_TOO_SLOW)
                self.transport.close()
                return
        elif cycle.fail(TooSlow("the body was received too slowly; send it faster, or in smaller requests")):
            return
        self.transport.abort()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Begin the turn of a request; uvicorn calls this for its own cycles and for pipelined exchanges."""
        self.connection.current = cycle
        self._slow_client.begin_window(self.loop.time())
        if isinstance(cycle, Exchange):
            # Not from within the end of the previous turn: a long pipeline would be as deep a recursion.
            self.loop.call_soon(cycle.start)
        else:
            cycle.scope["state"][FOLLOWS] = self.connection.has_more_requests
            super()._start_asgi_task(cycle, app)

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore the upgrade, as RFC 9110 (7.8) allows; the connection ends with the response."""

    def _find_api(self) -> tuple[InferenceApi, Target] | None:
        """Return the API of the request whose head is complete, or None if it is for the application."""
        if self.parser.get_method() != b"POST":
            return None
        url = self.url
        found = find_api(url.partition(b"?")[0].decode("latin-1"))
        if found is None and (b"#" in url or not url.startswith(b"/")):
            # The target is an absolute URI, which proxies are sent, or ends with a fragment.
            found = find_api((parse_url(url).path or b"").decode("latin-1"))
        return found

    def _exchange(self, api: InferenceApi, target: Target) -> Exchange:
        context = PredictContext(api, RequestHead(*target, self.headers), self._clock())
        if self._upgraded:
            error = MalformedBody(_UPGRADE)
            return Exchange(self.connection, context, keep_alive=False, expects_100=False, error=error)
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        return Exchange(self.connection, context, keep_alive, self.expect_100_continue)
