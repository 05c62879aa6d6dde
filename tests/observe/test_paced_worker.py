"""The thread that takes a small share of a core: bounded, and it drops what it has no time for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from inferpool.observe import paced_worker
from inferpool.observe.paced_worker import MOST_WAITING, SHARE, PacedWorker

from tests.server import wait_until


def nothing() -> None:
    """Do nothing at a tick."""


def test_items_come_in_order_and_the_last_ones_at_the_end() -> None:
    found: list[int] = []
    worker: PacedWorker[int] = PacedWorker("paced", found.extend, nothing, 60.0)
    for number in range(100):
        assert worker.offer(number)
    assert worker.close(60.0)
    assert found == list(range(100))


def test_what_waits_is_bounded() -> None:
    blocked, free = threading.Event(), threading.Event()

    def handle(items: Sequence[int]) -> None:
        blocked.set()
        free.wait()

    worker: PacedWorker[int] = PacedWorker("paced", handle, nothing, 60.0)
    assert worker.offer(0)
    blocked.wait()
    assert sum(worker.offer(number) for number in range(2 * MOST_WAITING)) == MOST_WAITING
    free.set()
    assert worker.close(60.0)


def test_items_are_not_gathered_for_long_if_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced_worker, "GATHER_S", 3600.0)
    handled = threading.Event()
    worker: PacedWorker[int] = PacedWorker("paced", lambda _: handled.set(), nothing, 3600.0)
    for number in range(MOST_WAITING // 2):
        worker.offer(number)
    assert handled.wait(60)
    assert worker.close(60.0)


def test_the_thread_rests_for_its_share_and_outlives_errors() -> None:
    used: list[float] = []

    def handle(items: Sequence[int]) -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.001:
            pass
        used.append(time.monotonic())
        raise ValueError("a made-up error")

    worker: PacedWorker[int] = PacedWorker("paced", handle, nothing, 60.0)
    for _ in range(3):
        for number in range(paced_worker.AT_ONCE):
            worker.offer(number)
    wait_until(lambda: len(used) == 3, "all are handled")
    # A busy machine makes rests longer, never shorter.
    assert used[-1] - used[0] >= 2 * 0.001 * (1 / SHARE - 1) * 0.9
    assert worker.close(60.0)
