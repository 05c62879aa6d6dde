"""Work of a low priority, and work whose priority falls once its own threads are there."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import pytest
from inferpool.system.priority import LOW_PRIORITY, at_falling_priority, at_low_priority

from tests.onnx_models import write_shift
from tests.server import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Threads that wait for it live until the test has ended."""
    event = threading.Event()
    yield event
    event.set()


def test_work_has_a_low_priority_and_its_caller_keeps_its_own() -> None:
    usual = priority()
    assert at_low_priority(priority) == max(usual, LOW_PRIORITY)
    assert priority() == usual


def test_the_priority_falls_after_the_threads_of_the_work_have_started(held: threading.Event) -> None:
    usual = priority()
    found: list[int] = []

    def own_thread() -> None:
        found.append(priority())
        held.wait()

    def work() -> int:
        first = priority()
        thread = threading.Thread(target=own_thread)
        thread.start()
        wait_until(lambda: priority() == max(usual, LOW_PRIORITY), "the priority falls")
        return first

    assert at_falling_priority(work, 1) == (usual, True)
    assert found == [usual]


def test_a_thread_that_came_too_late_is_told(held: threading.Event) -> None:
    if priority() >= LOW_PRIORITY:
        pytest.skip("these tests run at a low priority themselves")

    def work() -> None:
        threading.Thread(target=held.wait).start()
        wait_until(lambda: priority() == LOW_PRIORITY, "the priority falls")
        threading.Thread(target=held.wait).start()

    assert at_falling_priority(work, 1) == (None, False)


def test_work_that_fails_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        at_falling_priority(lambda: 1 / 0, 1)


def test_the_threads_of_a_session_start_before_its_work(tmp_path: Path) -> None:
    file = write_shift(tmp_path, "m", 1, 1.0) / "model.onnx"
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 3
    before = {entry.name for entry in Path("/proc/self/task").iterdir()}

    def load() -> ort.InferenceSession:
        return ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])

    session, is_usual = at_falling_priority(load, 2)
    started = {entry.name for entry in Path("/proc/self/task").iterdir()} - before
    assert session is not None
    assert is_usual
    assert len(started) >= 2
