"""A web thread is busy while it runs, and while it waits for a core."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from inferpool import server
from inferpool.observe.metrics import Metrics
from inferpool.server import core_wait_s, web_busy

from tests.server import START_S


def test_a_thread_that_waits_for_a_core_is_busy() -> None:
    """Beside a process that never rests, on one core, the thread is busy for longer than it runs."""
    core = min(os.sched_getaffinity(0))
    done = threading.Event()

    def run_beside_another() -> None:
        os.sched_setaffinity(0, {core})  # of this thread only
        source = web_busy(Metrics({}), threading.current_thread(), "web")
        [(_, _, began)] = source()
        cpu_began, ends = time.thread_time(), time.monotonic() + START_S
        while time.monotonic() < ends and not done.is_set():
            [(name, labels, busy)] = source()
            assert (name, labels) == ("web_busy_seconds_total", ("web",))
            if busy - began > time.thread_time() - cpu_began + 0.05:
                done.set()

    other = subprocess.Popen(
        [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    )
    try:
        thread = threading.Thread(target=run_beside_another)
        thread.start()
        thread.join()
    finally:
        other.kill()
        other.wait()
    assert done.is_set()


def test_a_kernel_that_tells_no_waiting_is_no_error(tmp_path: Path) -> None:
    assert core_wait_s(tmp_path / "missing") == 0.0
    (tmp_path / "schedstat").write_text("\n")
    assert core_wait_s(tmp_path / "schedstat") == 0.0


def test_the_counter_does_not_fall_while_the_waiting_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fall looks like a restart to Prometheus, which then counts all that was before once more."""
    told = iter([5.0, 0.0, 6.0])
    monkeypatch.setattr(server, "core_wait_s", lambda schedule: next(told))
    source = web_busy(Metrics({}), threading.current_thread(), "web")
    numbers = [number for _ in range(3) for _, _, number in source()]
    assert numbers == sorted(numbers)
    assert numbers[2] >= 6
