from __future__ import annotations

import threading

import pytest
from inferpool.system import every_second
from inferpool.system.every_second import EverySecond, until_next


@pytest.fixture
def _with_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_second, "PAUSE_S", 0.001)


def test_an_error_of_one_function_is_logged_and_the_others_are_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    twice = threading.Event()
    calls: list[int] = []

    def fail() -> None:
        raise ValueError("nothing there")

    def work() -> None:
        calls.append(1)
        if len(calls) > 1:
            twice.set()

    periodic = EverySecond({"looking": fail, "working": work})
    periodic.start()
    assert twice.wait(60), "the function is called again and again"
    periodic.close()
    assert "looking failed" in caplog.text
    assert "working failed" not in caplog.text
    assert "every-second" not in {thread.name for thread in threading.enumerate()}


def test_it_may_be_closed_without_a_start() -> None:
    EverySecond({}).close()


@pytest.mark.parametrize(("now", "left"), [(5.0, 1.0), (5.25, 0.75), (5.75, 1.25), (5.9999, 1.0001)])
def test_all_processes_wake_up_at_whole_seconds(now: float, left: float) -> None:
    assert until_next(now) == pytest.approx(left)
