"""Equal requests share a run: whatever happens to one of them, the others have their answers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from inferpool.http.predict.response_cache import HASHED_BYTES
from inferpool.pool.ports import VersionKey

from tests.http.connection import fakes
from tests.http.connection.fakes import FakeConnection, Harness

BODY = b'{"inputs": [[1, 2]]}'
SPELLED = b'{ "inputs" : [ [ 1.0 , 2e0 ] ] , "id" : "mine" }'
OTHER = b'{"inputs": [[1, 3]]}'


class Cached:
    """A harness whose model is cached, with a client for each request."""

    def __init__(self) -> None:
        self.released: list[int] = []
        self.harness = Harness("digest", release=self._release)
        self.clients: list[FakeConnection] = []

    def _release(self, key: VersionKey, entry_id: int) -> None:
        assert key == VersionKey("m", 1)
        self.released.append(entry_id)

    def send(self, body: bytes = BODY, *headers: tuple[bytes, bytes]) -> FakeConnection:
        client = self.harness.connect()
        exchange = client.begin((b"content-length", b"%d" % len(body)), *headers)
        exchange.receive(len(body), body)
        exchange.end_body()
        self.clients.append(client)
        self.harness.loop.settle()
        return client

    def run(self, *, fails: bool = False) -> None:
        """Run the only entry that waits."""
        (entry_id,) = self.harness.inbox.waiting
        self.harness.inbox.run(entry_id, fails=fails)
        self.harness.loop.settle()

    def assert_idle(self) -> None:
        in_flight = self.harness.predictor.in_flight
        assert (in_flight.requests, in_flight.accepted, self.harness.predictor.budget.used) == (0, 0, 0)
        assert not self.harness.inbox.waiting


@pytest.fixture
def cached() -> Cached:
    return Cached()


def told(client: FakeConnection) -> tuple[int, str]:
    """The status of the only response, and what it tells of the cache."""
    text = b"".join(client.transport.written).decode("latin-1")
    ((status, _),) = client.transport.responses()
    return status, text.partition("cache-status: ")[2].partition("\r\n")[0]


MISS, HIT, SHARED = "inferpool; fwd=miss", "inferpool; hit", "inferpool; fwd=miss; collapsed"


def test_equal_requests_share_a_run_and_later_ones_its_outputs(cached: Cached) -> None:
    first, second = cached.send(), cached.send()
    spelled = cached.send(SPELLED, (b"x-request-id", b"named"))
    assert len(cached.harness.inbox.waiting) == 1
    cached.run()
    assert [told(client) for client in (first, second, spelled)] == [
        (200, MISS),
        (200, SHARED),
        (200, SHARED),
    ]
    assert b'"id":"mine"' in spelled.transport.written[-1]
    assert told(cached.send()) == (200, HIT)
    assert told(cached.send(SPELLED)) == (200, HIT)
    cached.assert_idle()


def test_outputs_are_kept_when_a_request_comes_for_the_second_time(cached: Cached) -> None:
    for _ in range(2):
        client = cached.send()
        cached.run()
        assert told(client) == (200, MISS)
    assert told(cached.send()) == (200, HIT)


def test_other_requests_run_by_themselves(cached: Cached) -> None:
    cached.send()
    cached.send(OTHER)
    cached.send(b'{"inputs": [[1, 2], [1, 2]]}')
    assert len(cached.harness.inbox.waiting) == 3


def test_a_model_that_is_not_cached_runs_every_request_and_says_nothing() -> None:
    cached = Cached()
    cached.harness = Harness()
    client = cached.send()
    cached.send()
    assert len(cached.harness.inbox.waiting) == 2
    for entry_id in list(cached.harness.inbox.waiting):
        cached.harness.inbox.run(entry_id)
    cached.harness.loop.settle()
    assert told(client) == (200, "")


def test_nobody_joins_a_request_that_the_queue_has_refused(cached: Cached) -> None:
    for number in range(3):
        cached.harness.inbox.full = True
        assert told(cached.send(b'{"inputs": [[1, %d]]}' % number)) == (429, "")
    (version,) = cached.harness.cache._versions.values()
    assert not version.flights
    cached.harness.inbox.full = False
    client = cached.send()
    cached.run()
    assert told(client) == (200, MISS)
    cached.assert_idle()


def test_outputs_are_released_once_nobody_reads_them(cached: Cached) -> None:
    cached.send()
    unread = cached.harness.connect()
    unread.connection.write_paused = True
    exchange = unread.begin((b"content-length", b"%d" % len(BODY)))
    exchange.receive(len(BODY), BODY)
    exchange.end_body()
    cached.harness.loop.settle()
    (leader,) = cached.harness.inbox.waiting
    cached.run()
    assert cached.released == [leader]


@pytest.mark.parametrize("how", ["disconnects", "times out"])
def test_a_leader_that_leaves_fails_no_follower(cached: Cached, how: str) -> None:
    leader = cached.send(BODY, (b"x-timeout-ms", b"1000"))
    followers = [cached.send(), cached.send(), cached.send()]
    if how == "disconnects":
        leader.lose()
    else:
        cached.harness.loop.advance(2)
    cached.harness.loop.settle()
    cached.run()
    assert [told(client)[0] for client in followers] == [200, 200, 200]
    assert leader.transport.responses() == ([] if how == "disconnects" else [(504, "r0")])
    assert told(cached.send()) == (200, HIT)
    cached.assert_idle()


def test_a_follower_that_leaves_changes_nothing_for_the_others(cached: Cached) -> None:
    leader = cached.send()
    late, gone, patient = cached.send(BODY, (b"x-timeout-ms", b"1000")), cached.send(), cached.send()
    gone.lose()
    cached.harness.loop.advance(2)
    cached.harness.loop.settle()
    assert told(late)[0] == 504
    cached.run()
    assert [told(client)[0] for client in (leader, patient)] == [200, 200]
    assert gone.transport.responses() == []
    cached.assert_idle()


def test_when_all_have_left_nothing_runs_and_the_next_one_does(cached: Cached) -> None:
    for client in [cached.send(), cached.send()]:
        client.lose()
    cached.harness.loop.settle()
    cached.assert_idle()
    client = cached.send()
    cached.run()
    assert told(client) == (200, MISS)
    cached.assert_idle()


def test_a_failure_is_shared_and_not_kept(cached: Cached) -> None:
    clients = [cached.send(), cached.send()]
    cached.run(fails=True)
    assert [told(client)[0] for client in clients] == [500, 500]
    again = cached.send()
    cached.run()
    assert told(again) == (200, MISS)
    cached.assert_idle()


def test_a_follower_that_the_queue_refuses_fails_alone(cached: Cached) -> None:
    leader, one, other = cached.send(), cached.send(), cached.send()
    cached.harness.inbox.full = True
    leader.lose()
    cached.harness.loop.settle()
    assert [told(client)[0] for client in (one, other)] == [429, 429]
    cached.harness.inbox.full = False
    again = cached.send()
    cached.run()
    assert told(again) == (200, MISS)
    cached.assert_idle()


def test_a_request_of_higher_priority_does_not_wait_for_one_of_lower(cached: Cached) -> None:
    lower = cached.send(b'{"inputs": [[1, 2]], "parameters": {"priority": 9}}')
    higher = cached.send(b'{"inputs": [[1, 2]], "parameters": {"priority": 1}}')
    joined = cached.send()
    assert len(cached.harness.inbox.waiting) == 2
    for entry_id in list(cached.harness.inbox.waiting):
        cached.harness.inbox.run(entry_id)
    cached.harness.loop.settle()
    assert [told(client)[1] for client in (lower, higher, joined)] == [MISS, MISS, SHARED]
    cached.assert_idle()


def test_a_deadline_that_has_passed_gets_no_cached_answer(cached: Cached) -> None:
    for _ in range(2):
        cached.send()
        cached.run()
    client = cached.harness.connect()
    exchange = client.begin((b"content-length", b"%d" % len(BODY)), (b"x-timeout-ms", b"10"))
    cached.harness.loop.now += 1
    exchange.receive(len(BODY), BODY)
    exchange.end_body()
    cached.harness.loop.settle()
    assert told(client)[0] == 504
    cached.assert_idle()


def test_a_large_body_is_hashed_in_a_thread(cached: Cached) -> None:
    body = b'{"inputs": [[1, 2]' + b", [3, 4]" * (HASHED_BYTES // 8) + b"]}"
    clients = []
    for _ in range(2):
        clients.append(cached.send(body))
        cached.harness.loop.run_job()
        cached.harness.loop.settle()
    assert len(cached.harness.inbox.waiting) == 1
    cached.run()
    while cached.harness.loop.jobs:
        cached.harness.loop.run_job()
        cached.harness.loop.settle()
    assert [told(client)[0] for client in clients] == [200, 200]
    cached.assert_idle()


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_once_in_whatever_order_things_happen(seed: int) -> None:
    draw = random.Random(seed)
    cached = Cached()
    loop, inbox = cached.harness.loop, cached.harness.inbox
    lost = []
    for _ in range(150):
        what = draw.randrange(6)
        if what < 3:
            headers = [(b"x-timeout-ms", b"%d" % draw.choice((1, 500, 5000)))] if draw.random() < 0.5 else []
            cached.send(draw.choice((BODY, OTHER)), *headers)
        elif what == 3 and inbox.waiting:
            inbox.run(draw.choice(list(inbox.waiting)), fails=draw.random() < 0.3)
        elif what == 4 and cached.clients:
            client = draw.choice(cached.clients)
            if not client.transport.closing and not client.transport.responses():
                client.lose()
                lost.append(client)
        else:
            inbox.full = draw.random() < 0.2
            loop.advance(draw.choice((0.1, 1.0)))
        if draw.random() < 0.7:
            loop.settle()
    loop.settle()
    while inbox.waiting:
        inbox.run(next(iter(inbox.waiting)))
        loop.settle()
    for client in cached.clients:
        assert len(client.transport.responses()) == (0 if client in lost else 1)
    cached.assert_idle()
    assert all(not cache.flights for cache in cached.harness.cache._versions.values())


def test_outputs_that_cannot_be_kept_are_sent_all_the_same(
    cached: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(output: object) -> None:
        raise MemoryError

    monkeypatch.setattr(FakeOutputs, "copy", fail)
    monkeypatch.setattr(fakes.np, "zeros", lambda shape, dtype: np.ones(shape, dtype).view(FakeOutputs))
    clients = [cached.send(), cached.send()]
    cached.run()
    assert [told(client)[0] for client in clients] == [200, 200]
    cached.assert_idle()


class FakeOutputs(np.ndarray):
    """Outputs for whose copy there is no memory."""
