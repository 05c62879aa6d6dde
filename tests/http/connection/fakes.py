"""A connection without a socket and without an event loop: each step is made by a call."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from inferpool.errors import DeadlineExceeded, ModelFailed, NotReady, QueueFull
from inferpool.http.access.caller import EVERYONE
from inferpool.http.access.gate import Gate
from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange import Exchange
from inferpool.http.connection.shared import SharedState
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.recorder import RequestRecorder
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.response_cache import ResponseCache
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Entry, Result, VersionKey
from inferpool.repository.catalog import READY, ModelView, VersionView
from inferpool.tensors import Signature, TensorSpec

MAX_BODY_BYTES = 200_000
IN_FLIGHT_BYTES = 2_000_000
INPUT = TensorSpec("x", "FP32", (-1, 2))


class FakeHandle:
    """A call that is to be made at a moment."""

    def __init__(self, when: float, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.when = when
        self._call: Callable[..., None] | None = call
        self._arguments = arguments

    def cancel(self) -> None:
        self._call = None

    def run(self) -> None:
        if self._call is not None:
            self._call(*self._arguments)


class FakeFuture:
    """A call that a thread is to make."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._then: list[Callable[[FakeFuture], None]] = []
        self._outcome: Any = None
        self._error: Exception | None = None

    def add_done_callback(self, then: Callable[[FakeFuture], None]) -> None:
        self._then.append(then)

    def cancelled(self) -> bool:
        return False

    def exception(self) -> Exception | None:
        return self._error

    def result(self) -> Any:
        return self._outcome

    def run(self) -> None:
        self._outcome = self._function(*self._arguments)
        self._end()

    def fail(self, error: Exception) -> None:
        """End without a call: there is no thread for it."""
        self._error = error
        self._end()

    def _end(self) -> None:
        for then in self._then:
            then(self)


class FakeLoop:
    """An event loop whose time stands still."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ready: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.timers: list[FakeHandle] = []
        self.jobs: list[FakeFuture] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[..., None], *arguments: Any) -> None:
        self.ready.append((call, arguments))

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, call: Callable[..., None], *arguments: Any) -> FakeHandle:
        handle = FakeHandle(self.now + delay, call, arguments)
        self.timers.append(handle)
        return handle

    def run_in_executor(self, threads: Any, function: Callable[..., Any], *arguments: Any) -> FakeFuture:
        self.jobs.append(FakeFuture(function, arguments))
        return self.jobs[-1]

    def iterate(self) -> None:
        """Make the calls that are due now, but none that they add."""
        for _ in range(len(self.ready)):
            call, arguments = self.ready.popleft()
            call(*arguments)

    def settle(self) -> None:
        """Iterate until nothing is due."""
        while self.ready:
            self.iterate()

    def advance(self, seconds: float) -> None:
        """Let time pass, and make the calls whose moment has come."""
        self.now += seconds
        due = [handle for handle in self.timers if handle.when <= self.now]
        self.timers = [handle for handle in self.timers if handle.when > self.now]
        for handle in due:
            handle.run()

    def run_job(self, index: int = 0) -> None:
        """Let a thread finish."""
        self.jobs.pop(index).run()


_SOCKET = socket.socket()
"""The socket of every fake transport: a real one, from which nothing ever comes."""


class FakeTransport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.buffered = 0
        self.closing = False
        self.fault: Exception | None = None

    def write(self, data: bytes | memoryview) -> None:
        if self.fault is not None:
            raise self.fault
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def get_extra_info(self, name: str, default: object = None) -> object | None:
        return _SOCKET if name == "socket" else default

    def responses(self) -> list[tuple[int, str]]:
        """The status and the request id of each response."""
        found = []
        for text in b"".join(self.written).split(b"HTTP/1.1 ")[1:]:
            head = text.partition(b"\r\n\r\n")[0].decode("latin-1")
            if not head.startswith("100"):
                request_id = head.partition("x-request-id: ")[2].partition("\r\n")[0]
                found.append((int(head[:3]), request_id))
        return found


class FakeFlow:
    """uvicorn's flow control, of which the connection uses this."""

    read_paused = False

    def resume_reading(self) -> None:
        self.read_paused = False


class FakeServerState:
    """uvicorn's state of a server, of which the connection uses this."""

    def __init__(self) -> None:
        self.default_headers: list[tuple[bytes, bytes]] = []
        self.tasks: set[Any] = set()
        self.total_requests = 0


class FakeCatalog:
    """Serves version 1 of the model "m", which takes rows of two numbers."""

    def __init__(self, cache_digest: str | None = None) -> None:
        view = VersionView(
            VersionKey("m", 1), READY, signature=Signature((INPUT,), (INPUT,)), cache_digest=cache_digest
        )
        self._models = {"m": ModelView("m", "", {1: view}, {})}

    def models(self) -> Mapping[str, ModelView]:
        return self._models


class FakeInbox:
    """A queue whose entries run when a test says so."""

    def __init__(self, results: ResultDispatcher) -> None:
        self.waiting: dict[int, Entry] = {}
        self.full = self.unready = False
        self._results = results

    def offer(self, entry: Entry) -> None:
        if self.full:
            raise QueueFull("on purpose")
        self.waiting[entry.id] = entry

    def refuse_early(self, key: VersionKey, tenant: int) -> None:
        if self.unready:
            raise NotReady("on purpose")

    def cancel(self, key: VersionKey, entry_id: int, reason: str) -> None:
        if self.waiting.pop(entry_id, None) is not None:
            self._results.put([Result(entry_id, None, DeadlineExceeded(reason), 0.0)])

    def run(self, entry_id: int, *, columns: int = 2, fails: bool = False) -> None:
        """End an entry with rows of so many numbers, or with an error."""
        entry = self.waiting.pop(entry_id)
        outputs = {"x": np.zeros((len(entry.inputs["x"]), columns), np.float32)}
        error = ModelFailed("on purpose") if fails else None
        self._results.put([Result(entry_id, None if fails else outputs, error, 0.001, 0.002, 1)])


class Harness:
    """A predictor, and what all connections share, over the fakes above."""

    def __init__(self, cache_digest: str | None = None, release: Callable[..., None] | None = None) -> None:
        """Cache answers if there is a `cache_digest`; `release` is the predictor's."""
        self.loop = FakeLoop()
        results = ResultDispatcher()
        results.attach(cast("Any", self.loop))
        self.inbox = FakeInbox(results)
        metrics = Metrics({})
        self.cache = ResponseCache(2**20, metrics)
        self.predictor = Predictor(
            cast("Any", FakeCatalog(cache_digest)), self.inbox, results, metrics, self.loop.time,
            max_body_bytes=MAX_BODY_BYTES, in_flight_bytes=IN_FLIGHT_BYTES, recorder=RequestRecorder(),
            release=release, cache=self.cache,
        )  # fmt: skip
        self.shared = SharedState(self.predictor, Gate(self.loop.time))
        results.wrap_batches(self.shared.writes.begin, self.shared.writes.flush)

    def connect(self) -> FakeConnection:
        return FakeConnection(self)


class FakeConnection:
    """A connection, and in place of uvicorn's protocol the owner that its pipeline needs."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self.transport, self.flow = FakeTransport(), FakeFlow()
        self.pipeline: deque[Exchange] = deque()
        self.exchanges: list[Exchange] = []
        self.contexts: list[PredictContext] = []
        self.lost = False
        self.watched = 0
        self.connection = Connection(self, harness.shared, cast("Any", harness.loop), FakeServerState())
        self.connection.made(cast("Any", self.transport), self.flow, self.pipeline)

    def begin(
        self,
        *headers: tuple[bytes, bytes],
        model: str = "m",
        keep_alive: bool = True,
        error: Exception | None = None,
    ) -> Exchange:
        """Take the head of a request, as the parser's callback does."""
        head = RequestHead(model, None, [(b"x-request-id", b"r%d" % len(self.exchanges)), *headers])
        context = PredictContext(NATIVE_API, head, self._harness.loop.time())
        context.caller = EVERYONE
        exchange = Exchange(self.connection, context, keep_alive, expects_100=False, error=error)
        self.exchanges.append(exchange)
        self.contexts.append(context)
        self.connection.last = exchange
        if self.connection.current is None:
            self.connection.current = exchange
            exchange.start()
        else:
            self.flow.read_paused = True
            self.pipeline.appendleft(exchange)
        return exchange

    def lose(self) -> None:
        """Disconnect the client."""
        self.lost = True
        self.transport.closing = True
        for exchange in [self.connection.current, *self.pipeline]:
            if exchange is not None:
                exchange.lose()
        self.pipeline.clear()
        self.connection.lose()

    def data_received(self, data: bytes) -> None:
        raise AssertionError("no test reads in batches")

    def next_exchange(self) -> None:
        self.connection._server_state.total_requests += 1
        if not self.transport.closing:
            exchange = self.pipeline.pop()
            self.connection.current = exchange
            self._harness.loop.call_soon(exchange.start)

    def stop_reading(self) -> None:
        self.connection.reading_ended = True

    def linger(self) -> None:
        self.transport.close()

    def watch_reading(self) -> None:
        self.watched += 1
