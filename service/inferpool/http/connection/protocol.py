"""The predict lane below ASGI: uvicorn's HTTP protocol, which answers predictions itself.

A request for a prediction becomes an `Exchange`, which the parser's callbacks drive; one whose head is known
by its bytes does not even need the parser. Every other request, and whatever is not a plain POST, goes the
usual way through the application; both share connections, pipelining, keep-alive and shutdown, which stay
uvicorn's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, cast

import uvicorn
from httptools import HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from inferpool.errors import InternalError, MalformedBody, TooSlow
from inferpool.http.asgi import FOLLOWS, find_api
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.body_receiver import BodyReceiver
from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange import Exchange, try_cached_head
from inferpool.http.connection.slow_client import LEAST_BYTES, STALLED_S, SlowClientTimer
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.request_head import RequestHead

log = logging.getLogger(__name__)

MOST_HEAD_BYTES: Final = 64 * 1024
"""A request line and headers with more bytes than this are refused with 431."""

_UPGRADE: Final = "the request asks for another protocol, which hides its body; send it without Upgrade"

_TOO_LARGE_HEAD: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)
_TOO_SLOW: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class PredictProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        application: Any = config.loaded_app
        self.predictor: Predictor = application.predictor
        # First, for uvicorn sets its `cycle`.
        self.link = Connection(self, self.predictor, _loop or asyncio.get_running_loop(), server_state)
        super().__init__(config, server_state, app_state, _loop)
        self._muster: ReadBatcher = application.read_batcher
        self._bodies: list[bytes] = []
        self._arrival = SlowClientTimer()
        self._filling: BodyReceiver | None = None
        self._idle_check: asyncio.TimerHandle | None = None
        self._progress = False
        self._upgraded = False
        self._undrained: Exchange | None = None
        self._stall: asyncio.TimerHandle | None = None

    @property
    def cycle(self) -> Any:
        """The last request that has come; it is uvicorn that gives it this name."""
        return self.link.cycle

    @cycle.setter
    def cycle(self, cycle: Any) -> None:
        self.link.cycle = cycle

    # From the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: a request is to follow as soon as on a connection that is kept."""
        super().connection_made(transport)
        self.link.made(transport, self.flow, self.pipeline)
        self._idle_check = self.loop.call_later(self.timeout_keep_alive, self._check_idle)

    def data_received(self, data: bytes) -> None:
        """Answer a request whose head is known; feed all else to the parser, which calls back below."""
        if self._upgraded:
            return  # the parser stopped at the head, so what follows cannot be told apart from a request
        link = self.link
        now = self.loop.time()
        if try_cached_head(link, data, now):
            self._muster.join(link, len(data))
            return
        link.heard = now
        starts = link.between and (link.cycle is None or link.cycle.response_complete)
        self._arrival.size += len(data)
        self._bodies.clear()
        self._progress = False
        super().data_received(data)
        cycle = link.cycle
        if isinstance(cycle, Exchange):
            if link.between:
                if starts and len(self._bodies) == 1:
                    cycle.teach(data, self._bodies[0])
            elif not link.within_head and (room := cycle.room()) is not None:
                link.quiet_bytes = 0
                self._fill(room)
                return
        # Bytes that complete neither a head nor a piece of a body are those of a head, or of trailers.
        link.quiet_bytes = 0 if self._progress else link.quiet_bytes + len(data)
        if link.quiet_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE_HEAD)
            self.transport.close()

    def mustered(self, data: bytes) -> None:
        """The muster has read what is no request whose head is known, or one whose turn it is not."""
        self.data_received(data)
        if not self.link.between or self.flow.read_paused:
            self._muster.leave(self.link)

    def _fill(self, room: memoryview) -> None:
        if self._filling is None:
            self._filling = BodyReceiver(self)
            self.transport.set_protocol(self._filling)
        self._filling.fill(room)

    def came(self, size: int) -> None:
        """Bytes of a large body are in their place."""
        self.link.heard = self.loop.time()
        self._arrival.size += size
        self.link.idle_since = None
        if not cast("Exchange", self.cycle).came(size) and self._filling is not None:
            self._filling.throw_away()

    def full(self) -> None:
        """A large body is complete: what comes next is for a parser that knows nothing of it."""
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.link.between = True
        cast("Exchange", self.cycle).taken()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the request that is being answered, and of those behind it."""
        self._muster.leave(self.link)
        answered = self.link.answered
        if answered is not None and not answered.response_complete:
            # Its answer goes nowhere from here on: nothing can be written to what is closed.
            answered.disconnected = True
            answered.message_event.set()
        super().connection_lost(exc)
        for timer in (self._stall, self._idle_check):
            if timer is not None:
                timer.cancel()
        waiting = [answered, *(queued for queued, _ in self.pipeline), self._undrained]
        for exchange in waiting:
            if isinstance(exchange, Exchange):
                exchange.lose()
        self.pipeline.clear()
        # What refers to itself in a circle stays until the collector comes, and with it its body.
        self._filling = None
        self.link.lose()

    def pause_writing(self) -> None:
        """The client does not read; what the application answers waits for it where it is."""
        super().pause_writing()
        self.link.write_paused = True
        if not isinstance(self.link.answered, Exchange):
            self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client reads again: the next request on the connection may be answered."""
        super().resume_writing()
        self.link.write_paused = False
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._undrained is not None:
            exchange, self._undrained = self._undrained, None
            exchange.complete()

    # From the parser.

    def on_message_begin(self) -> None:
        """A request begins; what only the application needs is made when it gets the request."""
        self.link.between = False
        self.link.within_head = True
        self.link.idle_since = None
        self._arrival.begin(self.link.heard)
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Decide which way the request goes."""
        self._progress = True
        self.link.within_head = False
        self._upgraded = self.parser.should_upgrade()
        exchange = self._exchange()
        if exchange is None:
            url, headers, expect = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.headers, self.expect_100_continue = url, headers, expect
            self.scope["headers"] = headers
            super().on_headers_complete()
            return
        before: Any = self.cycle
        self.cycle = exchange
        if before is None or before.response_complete:
            self.link.answered = exchange
            exchange.start()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        """A chunk of the body."""
        self._progress = True
        self._bodies.append(body)
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            cycle.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there, all of it."""
        self.link.between = self._progress = True
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            cycle.taken()
        else:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer of a cycle of uvicorn's is with the transport."""
        self.link.completed()

    def next_exchange(self) -> None:
        """The next request on the connection has its turn."""
        super().on_response_complete()

    def _unset_keepalive_if_required(self) -> None:
        if not self.link.between:  # empty lines before a request are nothing of it
            self.link.idle_since = None

    def _check_idle(self) -> None:
        """Hang up where nothing has come for the time that a connection is kept, or too little of a request.

        That holds between requests, and within one: a client that stands still in the middle of a head or a
        body, or sends it in drops, and is not held up from here, holds a connection and what it has sent.
        """
        running = self.link.between and self.cycle is not None and not self.cycle.response_complete
        since = self.link.idle_since
        if since is None and not running and not self.flow.read_paused:
            since = self.link.heard
        left_s = float(self.timeout_keep_alive)
        if since is not None:
            left_s += since - self.loop.time()
        arrival_s = self._arrival_left_s()
        if left_s > 0 and arrival_s > 0:
            self._idle_check = self.loop.call_later(min(left_s, arrival_s), self._check_idle)
        elif left_s > 0:
            self._refuse_slow()
        elif self.link.between:
            self.timeout_keep_alive_handler()
        else:
            self.transport.abort()

    def _arrival_left_s(self) -> float:
        """Seconds that the request which is coming in may take until the next look at its pace."""
        if self.link.between:
            return math.inf
        now = self.loop.time()
        arriving = None if self.link.within_head else self.cycle
        if self.flow.read_paused or self.link.answered not in (None, arriving):
            # It is held up from here, or not its turn: the one before it is answered whatever becomes of it.
            self._arrival.begin(now)
        return self._arrival.left_s(now)

    def _refuse_slow(self) -> None:
        """Hang up on a request that comes too slowly, and say so where nothing else has been answered."""
        cycle: Any = self.cycle
        if self.link.within_head or not isinstance(cycle, Exchange):
            if self.link.within_head or not cycle.response_started:
                self.transport.write(_TOO_SLOW)
                self.transport.close()
                return
        elif self._undrained is None and not cycle.response_complete:
            cycle.fail(TooSlow("the body came too slowly"))
            return
        self.transport.abort()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.link.answered = cycle
        self._arrival.begin(self.loop.time())
        if isinstance(cycle, Exchange):
            # Not from within the end of the one before: a long pipeline would be as deep a recursion.
            self.loop.call_soon(cycle.start)
        else:
            cycle.scope["state"][FOLLOWS] = self.link.follows
            if self._upgraded:
                cycle.keep_alive = False
            super()._start_asgi_task(cycle, app)

    def _unsupported_upgrade_warning(self) -> None:
        """Upgrades are ignored, as RFC 9110 (7.8) allows, and the connection ends with the answer."""

    def _exchange(self) -> Exchange | None:
        """The exchange for the request whose head is there; None if it goes the usual way."""
        if self.parser.get_method() != b"POST":
            return None
        url = self.url
        found = find_api(url.partition(b"?")[0].decode("latin-1"))
        if found is None:
            if url.startswith(b"/") and b"#" not in url:
                return None
            # The target is an absolute URI, as a proxy is sent, or ends with a fragment.
            found = find_api((parse_url(url).path or b"").decode("latin-1"))
            if found is None:
                return None
        api, target = found
        call = PredictContext(api, RequestHead(*target, self.headers), self.predictor.clock())
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        if self._upgraded:
            return Exchange(
                self.link, call, keep_alive=False, expects_100=False, fault=MalformedBody(_UPGRADE)
            )
        return Exchange(self.link, call, keep_alive, self.expect_100_continue)

    def hold(self, exchange: Exchange) -> None:
        """Answer nothing more on this connection until the client has read what there is."""
        self._undrained = exchange
        self._watch(self.transport.get_write_buffer_size())

    def _watch(self, unread_bytes: int) -> None:
        """Hang up on a client that reads next to nothing of its answer for a while."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if left > unread_bytes - LEAST_BYTES:
                self.transport.abort()
            else:
                self._watch(left)

        self._stall = self.loop.call_later(STALLED_S, check)

    def run_aside(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None],
        threads: Executor | None = None,
    ) -> None:
        """Call `function` in another thread (of `threads`), and `then` with what it returned or raised."""

        async def work() -> None:
            try:
                outcome = await self.loop.run_in_executor(threads, function, *arguments)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - it is the caller's to answer
                outcome = error
            except BaseException as error:
                # Nor may what is no Exception leave it without an answer.
                outcome = InternalError("the server failed on this request; its log says why")
                log.exception("%s raised %s", getattr(function, "__name__", function), type(error).__name__)
            then(outcome)
            outcome = None  # an error's frames hold the body, and this frame among them the error

        task = self.loop.create_task(work())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
