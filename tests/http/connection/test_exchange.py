"""One prediction on a connection: whatever happens, in whatever order, there is one response at most."""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from inferpool.codecs.text import Rows
from inferpool.errors import MalformedBody, Overloaded, TooSlow
from inferpool.http.connection import batched_writes
from inferpool.http.connection.exchange import Exchange
from inferpool.http.connection.exchange_state import (
    DECODING,
    DONE,
    ENCODING,
    FOLLOWERS,
    QUEUED,
    READING,
    READY,
    STATES,
    WAITING,
    WRITING,
)
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.offload import HEAVY_JSON_BYTES
from inferpool.observe.build_info import hot_path
from inferpool.tensors import Tensors

from tests.http.connection.fakes import MAX_BODY_BYTES, FakeConnection, FakeTransport, Harness

BODY = b'{"inputs": [[1, 2]]}'
HEAVY_BODY = b'{"inputs": [[1, 2]' + b", [3, 4]" * (HEAVY_JSON_BYTES // 8) + b"]}"
LENGTH = (b"content-length", b"%d" % len(BODY))


@pytest.fixture
def harness() -> Harness:
    return Harness()


def send(exchange: Exchange, body: bytes) -> None:
    exchange.receive(len(body), body)
    exchange.end_body()


def assert_idle(harness: Harness) -> None:
    in_flight = harness.predictor.in_flight
    assert (in_flight.requests, in_flight.accepted, harness.predictor.budget.used) == (0, 0, 0)


def test_a_request_passes_through_its_states_in_order(harness: Harness) -> None:
    client = harness.connect()
    exchange = client.begin(LENGTH)
    states = [exchange.state]
    send(exchange, BODY)
    states.append(exchange.state)
    harness.loop.settle()
    states.append(exchange.state)
    (entry_id,) = harness.inbox.waiting
    harness.inbox.run(entry_id)
    harness.loop.settle()
    states.append(exchange.state)
    assert states == [READING, DECODING, QUEUED, DONE]
    assert client.transport.responses() == [(200, "r0")]
    assert_idle(harness)


def test_states_follow_one_another_by_the_table_alone(harness: Harness) -> None:
    assert len(FOLLOWERS) == len(STATES) == DONE + 1
    for state, followers in enumerate(FOLLOWERS):
        for to in range(len(STATES)):
            exchange = harness.connect().begin(LENGTH)
            exchange._state = state
            if to in followers:
                exchange._move(to)
                assert exchange.state == to
            else:
                with pytest.raises(RuntimeError, match=f"from {STATES[state]} to {STATES[to]}"):
                    exchange._move(to)


def test_a_refused_request_is_answered_once_however_late_its_body_arrives(harness: Harness) -> None:
    client = harness.connect()
    client.connection.write_paused = True
    exchange = client.begin(LENGTH, model="nobody")
    assert exchange.state == WRITING, "the client does not read its response"
    assert not exchange.receive(len(BODY), BODY)
    exchange.end_body()
    assert not exchange.fail(TooSlow("on purpose"))
    assert client.watched == 1
    client.connection.resume_writing()
    assert exchange.state == DONE
    assert client.transport.responses() == [(404, "r0")]
    assert_idle(harness)


def test_a_refused_request_is_freed_at_once(harness: Harness) -> None:
    """Its head may have 64 KiB: thousands of them must not wait for the garbage collector."""

    def refuse() -> weakref.ref[FakeTransport]:
        client = harness.connect()
        client.connection.write_paused = True
        client.begin(LENGTH, model="nobody")
        client.lose()
        return weakref.ref(client.transport)

    gc.collect()
    gc.disable()
    try:
        assert refuse()() is None
    finally:
        gc.enable()


def test_what_the_body_has_become_is_freed_with_the_response(harness: Harness) -> None:
    """The connection keeps its last request for as long as it is idle."""
    client = harness.connect()
    exchange = client.begin()
    (context,) = client.contexts
    send(exchange, b'{"inputs": [[1, 2]], "outputs": ["x"]}')
    assert context.options.outputs == ("x",)
    context.texts = [Rows([0], {})]
    harness.loop.settle()
    harness.inbox.run(*harness.inbox.waiting)
    harness.loop.settle()
    assert client.transport.responses() == [(200, "r0")]
    assert client.connection.last is exchange
    assert context.options.outputs is None
    assert not context.texts


def test_a_body_is_counted_the_same_way_in_chunks_and_in_its_memory(harness: Harness) -> None:
    exchange = harness.connect().begin((b"content-length", b"%d" % len(HEAVY_BODY)))
    assert exchange.receive(10, HEAVY_BODY[:10])
    memory = exchange.memory()
    assert memory is not None
    memory[:] = HEAVY_BODY[10:]
    assert exchange.receive(20, None)
    assert harness.predictor.budget.used == 30
    assert exchange.receive(len(HEAVY_BODY) - 30, None)
    exchange.end_body()
    assert exchange.state == DECODING
    harness.loop.run_job()
    assert exchange.state == QUEUED
    budget = harness.predictor.budget
    assert budget.used - budget.answers == len(HEAVY_BODY)


def test_a_body_that_turns_out_too_large_is_refused_in_its_turn(harness: Harness) -> None:
    client = harness.connect()
    first, second = client.begin(LENGTH), client.begin()
    for _ in range(3):
        second.receive(MAX_BODY_BYTES // 2, bytes(MAX_BODY_BYTES // 2))
    assert second.state == READY
    assert client.transport.responses() == []
    send(first, BODY)
    harness.loop.settle()
    harness.inbox.run(next(iter(harness.inbox.waiting)))
    harness.loop.settle()
    assert client.transport.responses() == [(200, "r0"), (413, "r1")]
    assert_idle(harness)


def test_a_deadline_ends_the_wait_for_a_thread_and_frees_the_body_after_it(harness: Harness) -> None:
    client = harness.connect()
    exchange = client.begin((b"content-length", b"%d" % len(HEAVY_BODY)), (b"x-timeout-ms", b"50"))
    send(exchange, HEAVY_BODY)
    harness.loop.advance(0.1)
    assert client.transport.responses() == [(504, "r0")]
    assert exchange.state == DONE
    assert harness.predictor.budget.used == len(HEAVY_BODY), "the thread still has the body"
    harness.loop.run_job()
    assert_idle(harness)


def test_a_body_without_a_thread_is_refused_and_freed(harness: Harness) -> None:
    client = harness.connect()
    exchange = client.begin((b"content-length", b"%d" % len(HEAVY_BODY)))
    send(exchange, HEAVY_BODY)
    harness.loop.jobs.pop().fail(Overloaded("there is no thread"))
    assert client.transport.responses() == [(503, "r0")]
    assert_idle(harness)


def test_a_body_that_the_system_maps_no_memory_for_is_refused(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    harness.predictor.budget.heap_bytes = 0
    client = harness.connect()
    exchange = client.begin((b"content-length", b"%d" % len(HEAVY_BODY)))
    assert exchange.receive(10, HEAVY_BODY[:10])
    assert exchange.memory() is None
    assert client.transport.responses() == [(503, "r0")]
    assert_idle(harness)


def test_a_deadline_drops_the_entry_from_the_queue(harness: Harness) -> None:
    client = harness.connect()
    send(client.begin(LENGTH, (b"x-timeout-ms", b"50")), BODY)
    harness.loop.settle()
    harness.loop.advance(0.1)
    harness.loop.settle()
    assert harness.inbox.waiting == {}
    assert client.transport.responses() == [(504, "r0")]
    assert_idle(harness)


def test_a_large_response_is_compressed_in_a_thread(harness: Harness) -> None:
    client = harness.connect()
    exchange = client.begin(LENGTH, (b"accept-encoding", b"gzip"))
    send(exchange, BODY)
    harness.loop.settle()
    harness.inbox.run(next(iter(harness.inbox.waiting)), columns=50_000)
    harness.loop.settle()
    assert exchange.state == ENCODING
    harness.loop.run_job()
    assert exchange.state == DONE
    assert client.transport.responses() == [(200, "r0")]
    assert b"content-encoding: gzip" in b"".join(client.transport.written)
    assert_idle(harness)


def test_what_ends_a_thread_is_answered_with_an_internal_error(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hot_path() == "compiled":
        pytest.skip("a test cannot replace a compiled method")
    client = harness.connect()
    exchange = client.begin((b"content-length", b"%d" % len(HEAVY_BODY)))

    def leave(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(harness.predictor, "decode", leave)
    send(exchange, HEAVY_BODY)
    harness.loop.run_job()
    assert client.transport.responses() == [(500, "r0")]
    assert_idle(harness)


@pytest.mark.parametrize("model", ["m", "nobody"])
def test_a_response_that_cannot_be_written_closes_the_connection(
    harness: Harness, caplog: pytest.LogCaptureFixture, model: str
) -> None:
    client = harness.connect()
    client.transport.fault = OSError("on purpose")
    exchange = client.begin(LENGTH, model=model)
    waiting = client.begin(LENGTH)
    send(exchange, BODY)
    harness.loop.settle()
    for entry_id in list(harness.inbox.waiting):
        harness.inbox.run(entry_id)
    harness.loop.settle()
    assert (exchange.state, client.transport.closing) == (DONE, True)
    (line,) = caplog.records
    assert line.exc_info is not None
    assert line.exc_info[1] is client.transport.fault
    client.lose()  # as the event loop does with every connection that is closed
    assert waiting.state == DONE
    assert_idle(harness)


class FaultyObserver:
    """Fails to observe a request at its begin, or at its end."""

    def __init__(self, *, begins: bool) -> None:
        self._begins = begins

    def begin(self, context: Any, tensors: object, now: float) -> None:
        context.observation = SimpleNamespace(observer=self)
        if not self._begins:
            raise OSError("on purpose")

    def end(self, context: object, outputs: object) -> None:
        raise OSError("on purpose")


@pytest.mark.parametrize("begins", [False, True])
def test_a_request_that_cannot_be_observed_is_answered(
    harness: Harness, caplog: pytest.LogCaptureFixture, begins: bool
) -> None:
    client = harness.connect()
    exchange = client.begin(LENGTH)
    served = client.contexts[0].served
    assert served is not None
    served.observer = FaultyObserver(begins=begins)
    send(exchange, BODY)
    harness.loop.settle()
    harness.inbox.run(*harness.inbox.waiting)
    harness.loop.settle()
    assert client.transport.responses() == [(200, "r0")]
    assert [line.exc_info is not None for line in caplog.records] == [True]
    assert_idle(harness)


class SeenObserver:
    """Remembers which responses a client had when its request was observed."""

    def __init__(self, client: FakeConnection) -> None:
        self.client = client
        self.seen: list[object] = []

    def begin(self, context: PredictContext, tensors: Tensors, now: float) -> None:
        context.observation = self
        self.end(context, tensors)

    def end(self, context: PredictContext, tensors: Tensors) -> None:
        assert tensors  # they are given back afterwards
        self.seen.append(self.client.transport.responses())


def test_a_request_is_observed_after_its_response_and_not_without_one(harness: Harness) -> None:
    """Nobody waits for the copies of those few requests that are observed."""
    client, gone = harness.connect(), harness.connect()
    exchanges = [each.begin(LENGTH) for each in (client, gone)]
    served = client.contexts[0].served
    assert served is not None
    observer = served.observer = SeenObserver(client)
    for exchange in exchanges:
        send(exchange, BODY)
    harness.loop.settle()
    gone.lose()
    harness.inbox.run(*harness.inbox.waiting)
    harness.loop.settle()
    assert observer.seen == [[(200, "r0")]] * 2
    assert_idle(harness)


KINDS = ("good", "timed", "heavy", "invalid", "nobody", "too large", "upgrade", "chunked", "last")
"""The requests that clients send in the state machine."""


class Life(RuleBasedStateMachine):
    """Requests on connections whose clients, models, threads and queues do anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.harness = Harness()
        self.clients: list[FakeConnection] = []
        self.client = self.connect()
        self.unsent: dict[Exchange, bytes] = {}
        self.writes_when_lost: dict[FakeConnection, int] = {}
        self.errors: list[logging.LogRecord] = []
        self.handler = logging.Handler(logging.ERROR)
        self.handler.emit = self.errors.append  # type: ignore[method-assign, assignment]
        logging.getLogger("inferpool").addHandler(self.handler)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(batched_writes, "_socketio", SimpleNamespace(send_all=self.send_all))

    def connect(self) -> FakeConnection:
        client = self.harness.connect()
        client.connection.descriptor = len(self.clients)  # so that responses are written in batches
        self.clients.append(client)
        return client

    def send_all(self, sockets: list[int], bodies: list[bytes]) -> list[int]:
        """Take all of the first response, and half of each other one."""
        taken = [len(body) // (1 if index == 0 else 2) for index, body in enumerate(bodies)]
        for socket, body, size in zip(sockets, bodies, taken, strict=True):
            self.clients[socket].transport.write(body[:size])
        return taken

    def has_unsent(self) -> bool:
        return bool(self.unsent)

    def begin(self, kind: str) -> Exchange | None:
        """The head of the next request arrives; a client sends it after the body of the one before."""
        client = self.client
        if client.transport.closing or any(exchange in self.unsent for exchange in client.exchanges):
            return None
        body = {"heavy": HEAVY_BODY, "invalid": b"{", "too large": bytes(2 * MAX_BODY_BYTES)}.get(kind, BODY)
        headers = [] if kind == "chunked" else [(b"content-length", b"%d" % len(body))]
        if kind in ("timed", "heavy"):
            headers.append((b"x-timeout-ms", b"1000"))
        headers.append((b"accept-encoding", b"gzip"))
        error = MalformedBody("on purpose") if kind == "upgrade" else None
        model = "nobody" if kind == "nobody" else "m"
        exchange = client.begin(*headers, model=model, keep_alive=kind != "last", error=error)
        self.unsent[exchange] = body
        return exchange

    @rule(kind=st.sampled_from(KINDS))
    def begin_request(self, kind: str) -> None:
        """A head arrives, without its body."""
        self.begin(kind)

    @rule(kinds=st.lists(st.sampled_from(("good", "heavy", *KINDS)), min_size=1, max_size=3))
    def send_requests(self, kinds: list[str]) -> None:
        """Complete requests arrive, maybe behind others."""
        for kind in kinds:
            exchange = self.begin(kind)
            if exchange is not None:
                send(exchange, self.unsent.pop(exchange))

    @precondition(has_unsent)
    @rule(data=st.data(), size=st.sampled_from([7, 100_000, 10**6]))
    def send_chunk(self, data: st.DataObject, size: int) -> None:
        """A part of a body arrives, in a chunk or in its memory."""
        exchange = data.draw(st.sampled_from(list(self.unsent)))
        body = self.unsent[exchange]
        part, rest = body[:size], body[size:]
        memory = exchange.memory()
        if memory is not None and len(memory) == len(body):
            memory[: len(part)] = part
            exchange.receive(len(part), None)
            if rest:  # from here on the rest goes to the same memory
                memory[len(part) :] = rest
                exchange.receive(len(rest), None)
            rest = b""
        else:
            exchange.receive(len(part), part)
        if rest:
            self.unsent[exchange] = rest
        else:
            del self.unsent[exchange]
            exchange.end_body()

    @rule()
    def iterate_loop(self) -> None:
        self.harness.loop.iterate()

    @precondition(lambda self: self.harness.inbox.waiting)
    @rule(data=st.data(), fails=st.booleans(), columns=st.sampled_from([2, 20_000]))
    def run_entries(self, data: st.DataObject, fails: bool, columns: int) -> None:
        """A batch ends."""
        waiting = st.sampled_from(list(self.harness.inbox.waiting))
        for entry_id in data.draw(st.lists(waiting, min_size=1, unique=True)):
            self.harness.inbox.run(entry_id, columns=columns, fails=fails)

    @precondition(lambda self: self.harness.loop.jobs)
    @rule()
    def finish_thread(self) -> None:
        self.harness.loop.run_job()

    @rule(seconds=st.sampled_from([0.01, 0.6]))
    def let_time_pass(self, seconds: float) -> None:
        self.harness.loop.advance(seconds)

    @rule(full=st.booleans(), unready=st.booleans())
    def change_pool(self, full: bool, unready: bool) -> None:
        """The queue becomes full, the version loses its instances, or recovers."""
        self.harness.inbox.full, self.harness.inbox.unready = full, unready

    @rule(closing=st.booleans(), draining=st.booleans())
    def change_server(self, closing: bool, draining: bool) -> None:
        in_flight = self.harness.predictor.in_flight
        in_flight.closing, in_flight.draining = closing, draining

    @rule()
    def stop_reading(self) -> None:
        """The client does not read what is written from here on."""
        if not self.client.lost:
            self.client.connection.write_paused = True
            self.client.transport.buffered = 1000

    @rule()
    def read_again(self) -> None:
        if not self.client.lost:
            self.client.transport.buffered = 0
            self.client.connection.resume_writing()

    @rule()
    def send_too_slowly(self) -> None:
        last = self.client.connection.last
        if last in self.unsent:
            last.fail(TooSlow("on purpose"))

    @precondition(lambda self: self.client.exchanges)
    @rule()
    def disconnect(self) -> None:
        """The client goes, and another one comes; what is under way for the first one arrives late."""
        client = self.client
        client.lose()
        for exchange in client.exchanges:
            self.unsent.pop(exchange, None)
        self.writes_when_lost[client] = len(client.transport.written)
        self.client = self.connect()

    @invariant()
    def there_is_one_response_for_each_request(self) -> None:
        for client in self.clients:
            ids = [request_id for _, request_id in client.transport.responses()]
            assert ids == [f"r{number}" for number in range(len(ids))], "in order, none twice"
            if not client.lost and not client.transport.closing:
                answered = [exchange.state >= WRITING for exchange in client.exchanges]
                assert answered.count(True) == len(ids)

    @invariant()
    def nothing_is_written_to_a_client_that_is_gone(self) -> None:
        for client, count in self.writes_when_lost.items():
            assert len(client.transport.written) == count
            assert all(exchange.state == DONE for exchange in client.exchanges)

    @invariant()
    def one_request_a_connection_has_its_turn(self) -> None:
        turns = [
            [READING <= exchange.state < DONE for exchange in client.exchanges] for client in self.clients
        ]
        assert all(turn.count(True) <= 1 for turn in turns)
        assert self.harness.predictor.in_flight.requests == sum(turn.count(True) for turn in turns)

    @invariant()
    def what_is_held_is_counted(self) -> None:
        contexts = [context for client in self.clients for context in client.contexts]
        predictor = self.harness.predictor
        assert predictor.budget.used == sum(context.reserved_bytes for context in contexts)
        assert predictor.in_flight.accepted == sum(context.entry is not None for context in contexts)
        for client in self.clients:
            for exchange, context in zip(client.exchanges, client.contexts, strict=True):
                if exchange.state == DONE and not context.offloaded_bytes:
                    assert context.reserved_bytes == 0

    def teardown(self) -> None:
        """Once all clients are gone and all threads done, nothing is held, and no call went wrong."""
        self.disconnect()
        while self.harness.loop.jobs or self.harness.loop.ready:
            self.harness.loop.settle()
            while self.harness.loop.jobs:
                self.harness.loop.run_job()
        logging.getLogger("inferpool").removeHandler(self.handler)
        self.patch.undo()
        assert_idle(self.harness)
        assert [record.getMessage() for record in self.errors] == []


def test_whatever_happens_each_request_has_one_response_at_most() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


def test_the_waiting_states_come_before_those_of_a_turn() -> None:
    assert WAITING < READY < READING
