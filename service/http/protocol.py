"""The predict lane below ASGI: uvicorn's HTTP protocol, which answers predictions itself.

A request for a prediction becomes an `Exchange`, a small state machine that is driven by the parser's
callbacks: no task, no events and no copies of the body but the one into place. Every other request, and
whatever is not a plain POST, goes the usual way through the application; both share connections,
pipelining, keep-alive and shutdown, which stay uvicorn's.

`Exchange` therefore has the attributes of uvicorn's `RequestResponseCycle` that its protocol touches:
`response_complete`, `keep_alive`, `disconnected` and `message_event`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import InferpoolError, MalformedBody
from service.http.head import Head
from service.http.intake import Intake
from service.http.lane import find_dialect
from service.http.predict import HEAVY_BYTES, Answer, Call, Predictor, compressed

if TYPE_CHECKING:
    from service.http.dialect import Data

MOST_HEAD_BYTES: Final = 64 * 1024
"""A request line and headers with more bytes than this are refused with 431."""

STALLED_S: Final = 60.0
"""A client that reads nothing of its answer for so long is hung up on."""

_UPGRADE: Final = "the request asks for another protocol, which hides its body; send it without Upgrade"

_JOINED_BYTES: Final = 64 * 1024
"""An answer up to this size is written with its head, in one piece."""

_TOO_LARGE_HEAD: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


class PredictProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        application: Any = self.app
        self.predictor: Predictor = application.predictor
        self._progress = False
        self._quiet_bytes = 0
        self._upgraded = False
        self._undrained: Exchange | None = None
        self._stall: asyncio.TimerHandle | None = None

    # From the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: a request is to follow as soon as on a connection that is kept."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        """Feed the parser, which calls back below."""
        if self._upgraded:
            return  # the parser stopped at the head, so what follows cannot be told apart from a request
        self._progress = False
        super().data_received(data)
        # Bytes that complete neither a head nor a piece of a body are those of a head, or of trailers.
        self._quiet_bytes = 0 if self._progress else self._quiet_bytes + len(data)
        if self._quiet_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE_HEAD)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the exchange under way, and of those behind it."""
        cycle: Any = self.cycle
        super().connection_lost(exc)
        if self._stall is not None:
            self._stall.cancel()
        waiting = [cycle, *(queued for queued, _ in self.pipeline), self._undrained]
        for exchange in waiting:
            if isinstance(exchange, Exchange):
                exchange.lose()
        self.pipeline.clear()

    def resume_writing(self) -> None:
        """The client reads again: the next request on the connection may be answered."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._undrained is not None:
            exchange, self._undrained = self._undrained, None
            exchange.complete()

    # From the parser.

    def on_message_begin(self) -> None:
        """A request begins; what only the application needs is made when it gets the request."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Decide which way the request goes."""
        self._progress = True
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
        self.cycle = exchange  # type: ignore[assignment]
        if before is None or before.response_complete:
            exchange.start()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        """A chunk of the body."""
        self._progress = True
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            cycle.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there, all of it."""
        self._progress = True
        cycle: Any = self.cycle
        if isinstance(cycle, Exchange):
            cycle.taken()
        else:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Exchange):
            # Not from within the end of the one before: a long pipeline would be as deep a recursion.
            self.loop.call_soon(cycle.start)
        else:
            if self._upgraded:
                cycle.keep_alive = False
            super()._start_asgi_task(cycle, app)

    def _unsupported_upgrade_warning(self) -> None:
        """Upgrades are ignored, as RFC 9110 (7.8) allows, and the connection ends with the answer."""

    def _exchange(self) -> Exchange | None:
        """The exchange for the request whose head is there; None if it goes the usual way."""
        url = self.url
        if not url.startswith((b"/predict", b"/v2/models/")) or self.parser.get_method() != b"POST":
            return None
        found = find_dialect(url.partition(b"?")[0].decode("latin-1"))
        if found is None:
            return None
        dialect, target = found
        call = Call(dialect, Head(*target, self.headers), self.predictor.clock())
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        if self._upgraded:
            return Exchange(self, call, keep_alive=False, expects_100=False, fault=MalformedBody(_UPGRADE))
        return Exchange(self, call, keep_alive, self.expect_100_continue)

    def hold(self, exchange: Exchange) -> None:
        """Answer nothing more on this connection until the client has read what there is."""
        self._undrained = exchange
        self._watch(self.transport.get_write_buffer_size())

    def _watch(self, unread_bytes: int) -> None:
        """Hang up on a client that reads nothing of its answer for a while."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if left >= unread_bytes:
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
            except Exception as error:  # noqa: BLE001 - it is the caller's to answer
                outcome = error
            then(outcome)

        task = self.loop.create_task(work())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Exchange:
    """One prediction: its body comes in, its entry runs, its answer goes out."""

    __slots__ = (
        "_body_complete", "_call", "_entered", "_fault", "_intake", "_predictor", "_protocol", "_started",
        "_waits_for_100", "disconnected", "keep_alive", "message_event", "response_complete",
    )  # fmt: skip

    def __init__(
        self,
        protocol: PredictProtocol,
        call: Call,
        keep_alive: bool,
        expects_100: bool,
        fault: InferpoolError | None = None,
    ) -> None:
        self._protocol = protocol
        self._predictor = protocol.predictor
        self._call = call
        self._intake = Intake(call.head, protocol.predictor.max_body_bytes)
        self._started = self._entered = self._body_complete = False
        self._fault = fault
        self._waits_for_100 = expects_100
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NEVER_AWAITED

    def start(self) -> None:
        """It is this request's turn on its connection."""
        if self.response_complete:
            return  # the client went while the turn was coming
        self._started = self._entered = True
        self._predictor.enter()
        try:
            self._predictor.admit(self._call)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)
            return
        if self._fault is not None:
            self._refuse(self._fault)
        elif self._body_complete:
            self._run()
        elif self._waits_for_100:
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def take(self, chunk: bytes) -> None:
        """The next chunk of the body; ignored where the request is refused already."""
        if self.response_complete or self._fault is not None:
            return
        try:
            self._predictor.reserve(self._call, len(chunk))
            self._intake.add(chunk)
        except InferpoolError as error:
            self._fault = error
            if self._started:
                self._refuse(error)

    def taken(self) -> None:
        """The body is complete."""
        self._body_complete = True
        if self._started and self._fault is None and not self.response_complete:
            self._run()

    def lose(self) -> None:
        """The client has gone."""
        if self.response_complete:
            return
        self.response_complete = self.disconnected = True
        self._predictor.drop(self._call)
        self._predictor.end(self._call)
        self._leave()

    def complete(self) -> None:
        """The answer is with the transport: the next request may have its turn."""
        if self.response_complete:
            return
        self.response_complete = True
        self._leave()
        if not self.keep_alive:
            self._protocol.transport.close()
        self._protocol.on_response_complete()

    def _run(self) -> None:
        predictor, call = self._predictor, self._call
        try:
            data = self._intake.whole()
            if predictor.is_heavy(call, data):
                threads = predictor.threads_for(call)
                self._protocol.run_aside(predictor.read, call, data, then=self._offer, threads=threads)
                return
            tensors = predictor.read(call, data)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)
            return
        # Not at once, but when every connection that has something to read has been read: the requests
        # of one round of the loop are offered together, so that an idle instance takes them together.
        self._protocol.loop.call_soon(self._offer, tensors)

    def _offer(self, tensors: Any) -> None:
        if self.disconnected:
            return
        if isinstance(tensors, Exception):
            self._refuse(tensors)
            return
        try:
            self._predictor.offer(self._call, tensors).add_done_callback(self._answer)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)

    def _answer(self, future: asyncio.Future[Any]) -> None:
        if self.disconnected or future.cancelled():
            return
        self._predictor.end(self._call)
        try:
            answer = self._predictor.answer(self._call, future.result())
        except Exception as error:  # noqa: BLE001 - whatever is wrong is answered
            self._refuse(error)
            return
        if not answer.compressible:
            self._write(answer)
        elif answer.size > HEAVY_BYTES:
            self._protocol.run_aside(compressed, answer, then=self._write)
        else:
            self._write(compressed(answer))

    def _refuse(self, error: Exception) -> None:
        self._predictor.end(self._call)
        self._write(self._predictor.refusal(self._call, error))

    def _write(self, answer: Answer) -> None:
        protocol = self._protocol
        if self.disconnected or protocol.transport.is_closing():
            self.lose()
            return
        if self._predictor.parting:
            self.keep_alive = False
        lines: list[Data] = [STATUS_LINE[answer.status]]
        for name, value in (*protocol.server_state.default_headers, *answer.headers):
            lines += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"content-length: %d\r\n\r\n" % answer.size)
        if answer.size <= _JOINED_BYTES:
            protocol.transport.write(b"".join((*lines, *answer.parts)))
        else:
            protocol.transport.write(b"".join(lines))
            for part in answer.parts:
                protocol.transport.write(part)
        self._predictor.answered(self._call)
        if protocol.flow.write_paused:
            protocol.hold(self)
        else:
            self.complete()

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._predictor.leave(self._call)
        else:
            self._predictor.answered(self._call)


class _NeverAwaited:
    """Stands for the event on which uvicorn's own cycles wait; nobody waits on this one."""

    def set(self) -> None:
        """There is nobody to wake."""


_NEVER_AWAITED: Final = _NeverAwaited()
