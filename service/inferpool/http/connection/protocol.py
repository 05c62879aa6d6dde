"""uvicorn's HTTP protocol, which answers predictions itself, below ASGI.

A request for a prediction becomes an `Exchange`, which the callbacks of the parser drive. A request whose
head is cached does not even need the parser. All other requests go to the application as usual. Both kinds
share connections, pipelining, keep-alive and shutdown, which stay uvicorn's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any, Final, cast

import uvicorn
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from inferpool.errors import HeadTooLarge, InferpoolError, MalformedRequest, TooSlow
from inferpool.http.access.admin_socket import ADMIN_SOCKET, LOCAL_ADMIN
from inferpool.http.access.caller import PREDICT
from inferpool.http.access.client_certificates import KEYLESS
from inferpool.http.asgi import FOLLOWS, api_of, find_api
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.body_receiver import BodyReceiver
from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange import MOST_DISCARDED_BYTES, Exchange
from inferpool.http.connection.exchange_state import WRITING
from inferpool.http.connection.fast_path import try_cached_head
from inferpool.http.connection.forwarded import CLIENT_CERTIFICATE, FORWARDED_FROM
from inferpool.http.connection.lingering_close import LingeringClose
from inferpool.http.connection.raw_head import head_bytes, head_without_upgrade, malformed_head, own_target
from inferpool.http.connection.reset_watch import watch_for_reset
from inferpool.http.connection.shared import SharedState
from inferpool.http.connection.slow_client import SlowClientTimer
from inferpool.http.predict.api import InferenceApi, Target
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_head import RequestHead

_TLS: Final = (
    "the client speaks TLS, and this port takes plain HTTP; ask for http://, or start the server with"
    " --tls-certificate-file"
)
_TLS_HELLO: Final = re.compile(rb"\x16\x03[\x00-\x04]")
"""How the first message of a TLS client begins."""
log = logging.getLogger(__name__)

_MALFORMED: Final = "the data is not an HTTP/1.1 request; the connection is closed after this response"
_REQUEST_ID: Final = re.compile(rb"\r\nx-request-id:[ \t]*([!-~]{1,128})[ \t]*\r\n", re.IGNORECASE)
_REFUSAL_FIELDS: Final = (b"x-request-id", b"origin", b"x-forwarded-for")
"""The headers that matter for the response to a request that cannot be read to its end."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


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
        self._most_head_bytes = shared.most_head_bytes
        self._root_path = shared.root_path
        self._aliases = shared.aliases
        self._head_checker = shared.head_checker
        self._chunks: list[bytes] = []
        self._parsed_something = False
        self._upgraded = self._tunnel = self._eof = False
        self._piece_bytes = self._head_bytes = self._discarded_bytes = 0
        self._fault: InferpoolError | None = None
        self.ended: Callable[[], None] | None = None

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
        if FORWARDED_FROM in self.app_state:
            self.connection.client = self.app_state[FORWARDED_FROM]
            self.client = (self.connection.client, 0)
        self._find_keyless(transport)
        if self.client is not None:
            self.client = (self.connection.client, self.client[1])
        self._slow_client.start()

    def _find_keyless(self, transport: asyncio.Transport) -> None:
        """Find out who sends the requests of this connection that come without a key."""
        gate = self.connection.shared.gate
        if not gate.enabled:
            return
        if ADMIN_SOCKET in self.app_state:
            caller = LOCAL_ADMIN
        elif FORWARDED_FROM in self.app_state:
            caller = gate.keyless(self.app_state[CLIENT_CERTIFICATE])
        else:
            caller = gate.keyless(transport.get_extra_info("peercert"))
        if caller is not gate.anonymous:
            self.connection.keyless = caller
            self.app_state = {**self.app_state, KEYLESS: caller}

    def data_received(self, data: bytes) -> None:
        """Answer a request whose head is cached; feed everything else to the parser, which calls back."""
        connection = self.connection
        if self._tunnel or connection.reading_ended:
            return  # what follows a request to CONNECT is no request
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
        self._piece_bytes = len(data)
        if connection.in_head:
            self._head_bytes += len(data)
        try:
            self._parse(data)
        except HttpParserError:
            if self.transport.is_closing():
                connection.reading_ended = True
            else:
                self._refuse_malformed(data)
        if connection.reading_ended:
            self._chunks.clear()
            return
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
        if connection.unparsed_bytes > self._most_head_bytes and not self.transport.is_closing():
            self._refuse_rest(self._head_too_large())

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep the connection while responses are owed: a client may end its side before it has read them."""
        connection = self.connection
        if connection.current is None or self.transport.is_closing():
            return None
        if not connection.between_requests and not connection.in_head:
            # The body of the last request stays incomplete.
            if not self.pipeline or self.pipeline[0][0] is not connection.last:
                return None
            incomplete = self.pipeline.popleft()[0]
            if isinstance(incomplete, Exchange):
                incomplete.lose()
        connection.reading_ended = self._eof = True
        last: Any = self.pipeline[0][0] if self.pipeline else connection.current
        last.keep_alive = False
        current: Any = connection.current
        if current.state < WRITING if isinstance(current, Exchange) else not current.response_started:
            if self.parser.get_http_version() != "1.0":
                # A client that is gone answers this with a reset, and its request need not run. Others ignore
                # it (RFC 9110, 15.2).
                self.transport.write(_CONTINUE)
            watch_for_reset(self.connection)
        return True

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
        if self.ended is not None:
            self.ended()
            self.ended = None

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
        self._new_parser()
        self.connection.between_requests = True
        cast("Exchange", self.cycle).end_body()

    def _parse(self, data: bytes) -> None:
        """Feed `data` to the parser, and ignore that a client asks for another protocol (RFC 9110, 7.8).

        The parser stops at the head of such a request, as if there were no body. So it reads the head again,
        without the fields that ask for the protocol.
        """
        rest: bytes | memoryview = data
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except HttpParserUpgrade as upgrade:
                if not self._upgraded:
                    self._tunnel = True
                    return
                rest = memoryview(rest)[upgrade.args[0] :]
            self._upgraded = False
            head = head_without_upgrade(self.parser, self.url, self.headers)
            self._new_parser()
            self.parser.feed_data(head)
            if not rest or self.connection.reading_ended:
                return

    def _new_parser(self) -> None:
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets them

    # From the parser.

    def on_message_begin(self) -> None:
        """Begin a request; what only the application needs is made when the head is complete."""
        self._head_bytes = self._piece_bytes
        self.connection.between_requests = False
        self.connection.in_head = True
        self.connection.idle_since = None
        self._slow_client.begin_window(self.connection.last_received)
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Make an exchange of a prediction, and give every other request to the application."""
        most = self._most_head_bytes
        if self._head_bytes > most and head_bytes(self.parser, self.url, self.headers) > most:
            self._fault = self._head_too_large()
            raise self._fault  # the parser stops
        self._parsed_something = True
        asks_upgrade = self.parser.should_upgrade()
        if asks_upgrade and self.parser.get_method() != b"CONNECT":
            self._upgraded = True  # `_parse` goes on
            return
        version = self.parser.get_http_version()
        self._fault = self._head_checker.fault(self.headers, version)
        if self._fault is not None:
            raise self._fault  # the parser stops
        self.connection.in_head = False
        self._discarded_bytes = 0
        self.url = own_target(self.url, self._root_path)
        if self._aliases:
            path, mark, query = self.url.partition(b"?")
            self.url = self._aliases.get(path, path) + mark + query
        found = self._find_api()
        if found is None:
            url, headers, expect = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.headers, self.expect_100_continue = url, headers, expect
            self.scope["headers"] = headers
            try:
                super().on_headers_complete()
            except Exception:
                self.connection.in_head = True  # the target has no path: there is no request
                raise
            if asks_upgrade:
                self.cycle.keep_alive = False
            return
        try:
            exchange = self._exchange(*found, version)
        except InferpoolError:
            raise
        except Exception:
            # The parser would make a malformed request of it, without a line in the log.
            log.exception("a request could not be received, and its connection is closed")
            self.transport.abort()
            raise
        self._begin(exchange)

    def on_body(self, body: bytes) -> None:
        """Pass on a chunk of the body."""
        self._parsed_something = True
        self._chunks.append(body)
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            if not cycle.receive(len(body), body) and not self.connection.reading_ended:
                self._discard(cycle, len(body))
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Take note that the request is complete."""
        if self._upgraded:
            return
        self.connection.between_requests = self._parsed_something = True
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            cycle.end_body()
        else:
            super().on_message_complete()

    def _refuse_malformed(self, data: bytes) -> None:
        """Refuse what the parser does not take of `data`, after the responses that are owed before."""
        fault, self._fault = self._fault, None
        connection = self.connection
        if fault is None and connection.in_head and self.headers is not None:
            # The parser keeps a header until the next one begins, and that one may be at fault.
            found = _REQUEST_ID.search(
                malformed_head(data, b"%b %b HTTP/" % (self.parser.get_method(), self.url))
            )
            if found is not None:
                self.headers.append((b"x-request-id", found[1]))
        if fault is None and connection.last is None and _TLS_HELLO.match(data):
            if connection.shared.log_limiter.suppressed(_TLS) is not None:
                log.warning("%s: %s", connection.client, _TLS)
            fault = MalformedRequest(_TLS)
        self._refuse_rest(fault or MalformedRequest(_MALFORMED))

    def _head_too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"the request line and headers have more than {self._most_head_bytes} bytes; send fewer headers"
        )

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
        part = "head" if self.connection.in_head else "body"
        error = TooSlow(f"the {part} was received too slowly; send it faster, or in smaller requests")
        if not self._refuse_rest(error):
            self.transport.abort()

    def stop_reading(self) -> None:
        """Read nothing more: the connection ends with the current response."""
        self.connection.reading_ended = True
        self._read_batcher.leave(self.connection)
        self.flow.pause_reading()

    def linger(self) -> None:
        """Close the connection once its client has read the response.

        If it were closed with unread data, the kernel would reset it, and the client might lose the response.
        """
        if self._eof:
            self.transport.close()
            return
        self.stop_reading()
        self.transport.write_eof()
        LingeringClose(self.transport, self.connection.descriptor, self.loop).start()
        self._slow_client.watch_closing()

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

    def _begin(self, exchange: Exchange) -> None:
        """Begin the turn of an exchange, or let it wait for earlier requests."""
        self.cycle = exchange
        if self.connection.current is None:
            self.connection.current = exchange
            exchange.start()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def _refuse_rest(self, error: InferpoolError) -> bool:
        """Respond with `error` to what is received now, after the responses that are owed before, and close.

        Reads nothing more. Returns False if what is received now has its response already.
        """
        connection = self.connection
        connection.reading_ended = True
        cycle: Any = connection.last
        if connection.in_head or connection.between_requests:
            exchange = self._refusal(error)
            connection.in_head, connection.between_requests = False, True
            self._begin(exchange)
            return True
        if isinstance(cycle, Exchange):
            if cycle.fail(error):
                return True
        elif not cycle.response_started:
            exchange = self._refusal(error)
            cycle.disconnected = True  # its response would be another one
            cycle.message_event.set()
            if connection.current is cycle:
                connection.current = None
            else:
                self.pipeline.popleft()
            connection.between_requests = True
            self._begin(exchange)
            return True
        cycle.keep_alive = False
        if connection.current is None:
            self.linger()
        return False

    def _refusal(self, error: InferpoolError) -> Exchange:
        """Return an exchange whose response is `error`, in the form of the API that the head names."""
        connection = self.connection
        headers = [] if connection.between_requests else self.headers or []
        url = b"" if connection.between_requests else self.url or b""
        head = RequestHead(None, None, [pair for pair in headers if pair[0] in _REFUSAL_FIELDS])
        if url:
            head.came_to(self.parser.get_method(), url)
        context = PredictContext(api_of(url.decode("latin-1")), head, self._clock())
        return Exchange(connection, context, keep_alive=False, expects_100=False, error=error)

    def _discard(self, exchange: Exchange, size: int) -> None:
        """Count `size` bytes of no use of a body of unknown length; close the connection if they are many."""
        self._discarded_bytes += size
        if self._discarded_bytes > MOST_DISCARDED_BYTES:
            exchange.keep_alive = False
            self.stop_reading()
            if exchange.response_complete:
                self.linger()

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

    def _exchange(self, api: InferenceApi, target: Target, version: str) -> Exchange:
        head = RequestHead(*target, self.headers)
        head.came_to(b"POST", self.url)
        kept_names = self.connection.shared.predictor.resolver.choice_headers
        if kept_names:
            head.keep(kept_names, self.headers)
        context = PredictContext(api, head, self._clock())
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        connection = self.connection
        caller = connection.shared.gate.check(
            self.headers, PREDICT, target.model, connection.client, connection.keyless
        )
        if isinstance(caller, InferpoolError):
            # The body is neither kept nor read to its end if it is long. The error has no traceback, whose
            # frames would keep the head alive.
            error = caller.with_traceback(None)
            return Exchange(connection, context, keep_alive, expects_100=False, error=error)
        context.caller = caller
        return Exchange(connection, context, keep_alive, self.expect_100_continue)
