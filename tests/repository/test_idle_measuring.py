"""A version that was measured on a busy machine is measured again when the machine is idle."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository import idle_measuring
from inferpool.repository.idle_measuring import BUSY_SHARE, IDLE_S, MOST_TRIES, PAUSE_S, IdleMeasuring
from inferpool.repository.lifecycle import BEGIN_LOAD, VersionLifecycle
from inferpool.repository.repository import Repository
from inferpool.settings import Settings
from inferpool.system.cpu_wait import CpuWait

from tests.onnx_models import write_shift
from tests.server import wait_until

A1 = VersionKey("a", 1)


def quiet() -> float:
    return 0.0


def test_only_a_measurement_of_a_busy_machine_is_doubtful() -> None:
    idle = IdleMeasuring()
    assert not idle.measured(A1, BUSY_SHARE / 2, 0.0)
    assert not idle.waits
    assert idle.measured(A1, BUSY_SHARE, 0.0)
    assert idle.waits
    assert not idle.measured(A1, 0.0, 1.0)
    assert not idle.waits


def test_it_waits_until_nothing_has_happened_for_a_while_and_others_leave_a_core() -> None:
    idle = IdleMeasuring()
    idle.measured(A1, 0.5, 0.0)
    start = PAUSE_S
    assert idle.due(start, work=1, waited_share=quiet) is None
    assert idle.due(start + IDLE_S - 1, work=1, waited_share=quiet) is None
    # A request begins the wait anew.
    assert idle.due(start + IDLE_S, work=2, waited_share=quiet) is None
    assert idle.due(start + 2 * IDLE_S - 1, work=2, waited_share=quiet) is None
    assert idle.due(start + 2 * IDLE_S, work=2, waited_share=lambda: 0.5) is None
    assert idle.due(start + 2 * IDLE_S, work=2, waited_share=quiet) == A1
    # It is under way, or has failed: not at once again.
    assert idle.due(start + 2 * IDLE_S, work=2, waited_share=quiet) is None


def test_nobody_asks_the_machine_if_there_is_nothing_to_measure() -> None:
    idle = IdleMeasuring()

    def fail() -> float:
        raise AssertionError

    for now in (0.0, IDLE_S, 2 * IDLE_S):
        assert idle.due(now, work=1, waited_share=fail) is None


def test_a_machine_that_is_never_idle_is_given_up() -> None:
    idle, now, tries = IdleMeasuring(), 0.0, []
    idle.due(now, work=1, waited_share=quiet)
    while idle.measured(A1, 0.9, now):
        while idle.due(now, work=1, waited_share=quiet) is None:
            now += 10
        tries.append(now)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert len(tries) == MOST_TRIES
    assert pauses == sorted(pauses)
    assert pauses[-1] > 10 * pauses[0]


def test_a_version_that_serves_no_longer_is_forgotten() -> None:
    idle = IdleMeasuring()
    idle.measured(A1, 0.5, 0.0)
    idle.forget(A1)
    assert not idle.waits


def test_a_version_may_be_unloaded_while_the_machine_is_asked() -> None:
    idle = IdleMeasuring()
    idle.measured(A1, 0.5, 0.0)
    idle.due(0.0, work=1, waited_share=quiet)

    def unload() -> float:
        idle.forget(A1)
        return 0.0

    assert idle.due(PAUSE_S + IDLE_S, work=1, waited_share=unload) is None
    assert not idle.waits


def test_a_lifecycle_loads_what_it_serves_once_more_and_goes_on_serving() -> None:
    lifecycle = VersionLifecycle()
    lifecycle.want("source")
    lifecycle.load_begun()
    lifecycle.loaded()
    assert lifecycle.step(0.0) is None
    lifecycle.load_again()
    assert lifecycle.step(0.0) == BEGIN_LOAD
    lifecycle.load_begun()
    lifecycle.load_failed("no room")
    assert (lifecycle.succeeded, lifecycle.step(0.0)) == (True, None)
    lifecycle.load_again()
    lifecycle.unwant()
    assert lifecycle.step(0.0) != BEGIN_LOAD


def test_the_new_plan_takes_over_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shift(tmp_path / "models", "a", 1, 1.0)
    settings = Settings(cache_dir=tmp_path / "cache", measure_ms=20, devices=("cpu",))
    with monkeypatch.context() as busy:
        busy.setattr(CpuWait, "share", lambda self: 0.8)
        repository = Repository(
            tmp_path / "models", settings, ResultDispatcher(), Metrics({}), time.monotonic
        )
        repository.load_now()
    try:
        before = repository.loaded(A1)
        assert before.waited == 0.8
        monkeypatch.setattr(CpuWait, "share", lambda self: 0.01)
        monkeypatch.setattr(idle_measuring, "waited_share", lambda: 0.0)
        now = time.monotonic() + PAUSE_S
        repository.idle.look(now)
        assert repository.loaded(A1) is before
        repository.idle.look(now + IDLE_S)
        wait_until(lambda: repository.loaded(A1) is not before, "the version is measured again")
        assert repository.loaded(A1).waited == 0.01
        [kept] = (tmp_path / "cache").glob("a-*.json")
        assert '"waited": 0.01' in kept.read_text()
        assert repository.models()["a"].versions[1].state == "ready"
    finally:
        assert repository.drain(10)
        repository.close()
