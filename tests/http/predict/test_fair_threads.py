"""Threads that several clients share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from inferpool.errors import Overloaded
from inferpool.http.predict.fair_threads import FairThreads

WAIT_S = 20


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Jobs wait for it; it is opened after the test."""
    event = threading.Event()
    yield event
    event.set()


def started(gate: threading.Event, threads: FairThreads, client: str) -> tuple[Future[Any], threading.Event]:
    """Submit a job that waits for the gate; returns its future, and the event that it has begun."""
    begun = threading.Event()

    def work() -> bool:
        begun.set()
        return gate.wait(WAIT_S)

    return threads.of(client).submit(work), begun


def test_one_client_leaves_a_thread_to_others(gate: threading.Event) -> None:
    threads = FairThreads(2, "test")
    much = [started(gate, threads, "a") for _ in range(5)]
    assert all(begun.wait(WAIT_S) for _, begun in much[:2])
    assert threads.of("b").submit(lambda: "at once").result(WAIT_S) == "at once"
    assert [begun.is_set() for _, begun in much] == [True, True, False, False, False]
    gate.set()
    assert all(job.result(WAIT_S) for job, _ in much)


def test_clients_take_turns() -> None:
    threads = FairThreads(1, "test")
    both, gate = threading.Barrier(3, timeout=WAIT_S), threading.Event()

    def hold() -> None:
        both.wait()
        gate.wait(WAIT_S)

    holding = [threads.of(client).submit(hold) for client in ("x", "y")]
    both.wait()  # both threads are taken
    order: list[str] = []
    jobs = [
        threads.of(client).submit(order.append, f"{client}{number}")
        for client in ("a", "b", "c")
        for number in range(3)
    ]
    gate.set()
    for job in [*holding, *jobs]:
        job.result(WAIT_S)
    assert len(order) == 9
    for client in "abc":
        assert [name for name in order if name[0] == client] == [f"{client}{number}" for number in range(3)]
    assert {name[0] for name in order[:5]} == set("abc"), f"one client went first: {order}"


def test_errors_and_cancelled_jobs_leave_no_thread_behind(gate: threading.Event) -> None:
    threads = FairThreads(1, "test")

    def fail() -> None:
        raise SystemExit("a library ends its thread")

    for _ in range(5):
        with pytest.raises(SystemExit):
            threads.of("a").submit(fail).result(WAIT_S)
    first, begun = started(gate, threads, "a")
    assert begun.wait(WAIT_S)
    waiting = threads.of("a").submit(lambda: 1)
    assert waiting.cancel()
    gate.set()
    assert first.result(WAIT_S)
    assert threads.of("a").submit(lambda: 2).result(WAIT_S) == 2


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_jobs_fail_while_the_system_has_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failures leave nothing behind: once there are threads again, all of them can be used."""
    threads = FairThreads(1, "test")
    ran: list[int] = []
    with monkeypatch.context() as refused:
        refuse_threads(refused)
        for number in range(3):
            with pytest.raises(Overloaded, match="try again later"):
                threads.of("a").submit(ran.append, number).result(WAIT_S)
    assert threads.of("a").submit(lambda: "again").result(WAIT_S) == "again"
    assert not ran


def test_jobs_wait_for_the_threads_there_are(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = FairThreads(2, "test")
    first, begun = started(gate, threads, "a")
    assert begun.wait(WAIT_S)
    with monkeypatch.context() as refused:
        refuse_threads(refused)
        others = [threads.of(client).submit(lambda: "later") for client in ("a", "b", "c")]
    gate.set()
    assert first.result(WAIT_S)
    assert [job.result(WAIT_S) for job in others] == ["later"] * 3
