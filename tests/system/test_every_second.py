from __future__ import annotations

import threading

import pytest
from inferpool.system import every_second
from inferpool.system.every_second import EverySecond


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_second, "PAUSE_S", 0.0)


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
