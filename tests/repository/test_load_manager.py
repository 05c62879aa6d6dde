"""Which versions load at once, which first, and that nothing else loads while one is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from inferpool.pool.ports import VersionKey
from inferpool.repository.config import ModelConfig
from inferpool.repository.lifecycle import LOAD, MEASURE, VERIFY, WARM, Phase, VersionLifecycle
from inferpool.repository.load_manager import LoadManager
from inferpool.repository.version_source import VersionSource

from tests.server import wait_until


def source(name: str) -> VersionSource:
    return VersionSource(Path(name), None, ModelConfig(), (), name, 0.0)


class Host:
    """Loads by going through the phases; each phase of a version ends when the test lets it."""

    def __init__(self) -> None:
        self.at: dict[str, Phase] = {}
        self.begun: list[str] = []
        self.room = True
        self._passed: dict[tuple[str, Phase], threading.Event] = {}
        self._all = threading.Event()

    def let(self, name: str, *phases: Phase) -> None:
        for phase in phases:
            self._gate(name, phase).set()

    def let_all(self) -> None:
        self._all.set()
        for gate in list(self._passed.values()):
            gate.set()

    def _gate(self, name: str, phase: Phase) -> threading.Event:
        return self._passed.setdefault((name, phase), threading.Event())

    def load(
        self,
        key: VersionKey,
        source: VersionSource,
        enter: Callable[[Phase], None],
        is_over: Callable[[], bool],
    ) -> Any:
        self.begun.append(key.model)
        for phase in (VERIFY, LOAD, MEASURE, WARM):
            enter(phase)
            if phase == MEASURE:
                others = [at for name, at in self.at.items() if name != key.model]
                assert MEASURE not in others, "two versions are measured at once"
            self.at[key.model] = phase
            gate = self._gate(key.model, phase)
            if not self._all.is_set():
                gate.wait()
        del self.at[key.model]
        return None

    def fits_beside(self, source: VersionSource, others: Sequence[VersionSource]) -> bool:
        return self.room

    def show(self, key: VersionKey, lifecycle: VersionLifecycle) -> bool:
        return False

    def serve(self, key: VersionKey, loaded: object) -> None: ...

    def discard(self, loaded: object) -> None: ...

    def retire(self, key: VersionKey) -> None: ...

    def jobs_changed(self) -> None: ...

    def await_seen(self) -> None: ...

    def count_load(self, key: VersionKey, outcome: str) -> None: ...

    def leave(self, key: VersionKey) -> None: ...

    def is_elsewhere(self, key: VersionKey) -> bool:
        return False


class Loads:
    """A manager that was told to serve models, and its host."""

    def __init__(self, models: str, *, room: bool = True, **options: Any) -> None:
        self.host = Host()
        self.host.room = room
        self.settled = threading.Event()
        self.manager = LoadManager(self.host, self.host, time.monotonic, time.time, None, **options)
        for name in models:
            self.want(name)
        self.manager.start(self.settled.set)

    def want(self, name: str) -> None:
        self.manager.want(VersionKey(name, 1), source(name))

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        wait_until(condition, f"{what}; at {self.host.at}")

    def close(self) -> None:
        self.host.let_all()
        self.manager.stop()
        wait_until(lambda: not self.manager.is_loading, "all loads have ended")


@pytest.fixture
def start() -> Iterator[Callable[..., Loads]]:
    started: list[Loads] = []

    def begin(models: str, **options: Any) -> Loads:
        started.append(Loads(models, **options))
        return started[-1]

    yield begin
    for loads in started:
        loads.close()


def test_required_models_load_first(start: Callable[..., Loads]) -> None:
    loads = start("abcd", first=["c", "d"])
    loads.host.let_all()
    assert loads.settled.wait(60)
    assert loads.host.begun == ["c", "d", "a", "b"]


def test_one_version_is_measured_while_nothing_else_loads(start: Callable[..., Loads]) -> None:
    loads = start("abc", loads_at_once=2)
    host = loads.host
    for name in "ab":
        host.let(name, VERIFY)
    loads.wait("a and b load at once", lambda: host.at == {"a": LOAD, "b": LOAD})
    host.let("a", LOAD)
    host.let("b", LOAD)
    loads.wait("one of them is measured", lambda: sorted(host.at.values()) == sorted([LOAD, MEASURE]))
    assert host.begun == ["a", "b"]
    first = next(name for name, phase in host.at.items() if phase == MEASURE)
    second = "b" if first == "a" else "a"
    host.let(first, MEASURE, WARM)
    loads.wait("the other is measured when the first has ended", lambda: host.at.get(second) == MEASURE)
    host.let_all()
    assert loads.settled.wait(60)


def test_later_loads_come_one_at_a_time(start: Callable[..., Loads]) -> None:
    loads = start("a", loads_at_once=4)
    loads.host.let("a", VERIFY, LOAD, MEASURE, WARM)
    assert loads.settled.wait(60)
    loads.want("b")
    loads.want("c")
    loads.wait("b loads", lambda: loads.host.at == {"b": VERIFY})
    assert loads.host.begun == ["a", "b"]


def test_a_version_that_does_not_fit_beside_the_others_waits(start: Callable[..., Loads]) -> None:
    loads = start("ab", loads_at_once=4, room=False)
    loads.wait("a loads", lambda: loads.host.at == {"a": VERIFY})
    loads.host.let("a", VERIFY)
    loads.wait("a is read", lambda: loads.host.at == {"a": LOAD})
    assert loads.host.begun == ["a"]
    loads.host.let("a", LOAD, MEASURE, WARM)
    loads.wait("b loads then", lambda: loads.host.at == {"b": VERIFY})


def test_a_load_that_does_not_end_is_measured_beside(
    start: Callable[..., Loads], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferpool.repository.health.PATIENCE_S", 0.2)
    loads = start("ab", loads_at_once=2)
    loads.host.let("b", VERIFY, LOAD)
    loads.wait("b is measured while a hangs", lambda: loads.host.at == {"a": VERIFY, "b": MEASURE})


def test_a_job_shows_the_phase_that_its_load_has_entered_before(start: Callable[..., Loads]) -> None:
    loads = start("a")
    wait_until(lambda: loads.host.at.get("a") == VERIFY, "the load waits in its first phase")
    assert loads.manager.begin_job("load", "a", 1, [1]).phase == VERIFY
    loads.host.let("a", VERIFY)
    wait_until(lambda: loads.host.at.get("a") == LOAD, "the load waits in its second phase")
    [job] = loads.manager.jobs()
    assert job.phase == LOAD
