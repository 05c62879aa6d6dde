"""Captures are alone on the device, whatever the order in which threads come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from inferpool.backends.cuda.capture_gate import CaptureGate

WAIT_S = 30
"""How long a thread may take to come, on a busy machine."""


def test_runs_overlap_and_a_capture_waits_for_all_of_them() -> None:
    gate = CaptureGate()
    both, go, order = threading.Barrier(2), threading.Event(), list[str]()

    def run() -> None:
        with gate.work():
            both.wait(WAIT_S)  # passes only if two runs are in progress at once
            assert go.wait(WAIT_S)
            order.append("run")

    def capture() -> None:
        with gate.capture():
            order.append("capture")

    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(run) for _ in range(2)]
        capturing = threads.submit(capture)
        go.set()
        for each in (*runs, capturing):
            each.result(WAIT_S)
    assert order.count("run") == 2
    assert order[-1] == "capture" or order[0] == "capture"


def test_a_run_waits_for_a_capture_and_the_capturing_thread_may_run() -> None:
    gate = CaptureGate()
    captures, order = threading.Event(), list[str]()

    def run() -> None:
        assert captures.wait(WAIT_S)
        with gate.work():
            order.append("other run")

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(run)
        with gate.capture():
            assert gate.capturing
            captures.set()
            with gate.work():
                order.append("own run")
            order.append("captured")
        other.result(WAIT_S)
    assert order == ["own run", "captured", "other run"]
    assert not gate.capturing


def test_a_capture_or_a_run_that_fails_lets_the_others_in() -> None:
    gate = CaptureGate()
    with pytest.raises(ValueError, match="no kernel"), gate.capture():
        raise ValueError("no kernel")
    with pytest.raises(ValueError, match="no memory"), gate.work():
        raise ValueError("no memory")
    with gate.capture(), gate.work():
        assert gate.capturing


def test_many_threads_never_run_beside_a_capture() -> None:
    gate, lock = CaptureGate(), threading.Lock()
    running, seen = set[str](), list[bool]()

    def take_part(number: int) -> None:
        for _ in range(50):
            kind = "capture" if number % 3 == 0 else "run"
            with gate.capture() if kind == "capture" else gate.work():
                with lock:
                    running.add(f"{kind} {number}")
                    seen.append(len(running) == 1 or not any(name.startswith("capture") for name in running))
                with lock:
                    running.remove(f"{kind} {number}")

    with ThreadPoolExecutor(6) as threads:
        for each in [threads.submit(take_part, number) for number in range(6)]:
            each.result(WAIT_S)
    assert len(seen) == 300
    assert all(seen)


def test_runs_go_on_while_a_session_is_opened_and_a_capture_waits_for_it() -> None:
    gate = CaptureGate()
    opened, ran, order = threading.Event(), threading.Event(), list[str]()

    def open_session() -> None:
        with gate.open():
            opened.set()
            assert ran.wait(WAIT_S)
            order.append("opened")

    def capture() -> None:
        with gate.capture():
            order.append("captured")

    with ThreadPoolExecutor(2) as threads:
        opening = threads.submit(open_session)
        assert opened.wait(WAIT_S)
        capturing = threads.submit(capture)
        with gate.work():
            order.append("run")
        ran.set()
        opening.result(WAIT_S)
        capturing.result(WAIT_S)
    assert order == ["run", "opened", "captured"]
