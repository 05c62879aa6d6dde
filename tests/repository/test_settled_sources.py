"""Files count as complete when they stand still."""

from __future__ import annotations

from pathlib import Path

from inferpool.pool.ports import VersionKey
from inferpool.repository.config import ModelConfig
from inferpool.repository.settled_sources import SETTLE_S, SettledSources
from inferpool.repository.version_source import VersionSource

KEY = VersionKey("a", 1)
WALL = 1_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0


def source(size: int, changed_at: float) -> VersionSource:
    return VersionSource(Path("model.onnx"), None, ModelConfig(), (), size, changed_at)


def settled() -> tuple[SettledSources, Clock]:
    clock = Clock()
    return SettledSources(lambda: clock.now, lambda: WALL + clock.now), clock


def test_files_that_are_old_when_they_appear_are_complete() -> None:
    sources, _ = settled()
    assert sources.is_settled(KEY, source(1, WALL - SETTLE_S))


def test_files_that_grow_wait_until_they_stand_still() -> None:
    sources, clock = settled()
    for size in range(20):
        assert not sources.is_settled(KEY, source(size, WALL + clock.now))
        clock.now += 0.4
    last = source(20, WALL + clock.now)
    assert not sources.is_settled(KEY, last)
    clock.now += SETTLE_S
    assert sources.is_settled(KEY, last)


def test_a_clock_of_a_file_server_that_runs_ahead_keeps_nothing_waiting_for_ever() -> None:
    sources, clock = settled()
    ahead = source(1, WALL + 3600)
    assert not sources.is_settled(KEY, ahead)
    clock.now += SETTLE_S
    assert sources.is_settled(KEY, ahead)


def test_a_version_that_vanishes_for_a_moment_is_not_deleted() -> None:
    sources, clock = settled()
    assert sources.is_settled(KEY, source(1, WALL - 10))
    assert not sources.is_settled(KEY, None)
    clock.now += SETTLE_S / 2
    assert sources.is_settled(KEY, source(1, WALL - 10))
    clock.now += SETTLE_S
    assert not sources.is_settled(KEY, None)
    clock.now += SETTLE_S
    assert sources.is_settled(KEY, None)
