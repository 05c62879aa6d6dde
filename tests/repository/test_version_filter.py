"""Which versions an engine takes of all that are in the folder."""

from __future__ import annotations

from inferpool.pool.ports import VersionKey
from inferpool.repository.version_filter import VersionFilter

A1, A2, B1 = VersionKey("a", 1), VersionKey("a", 2), VersionKey("b", 1)


def test_without_a_choice_all_are_taken_but_those_to_skip() -> None:
    versions = VersionFilter(None, [A1])
    assert [versions.takes(key) for key in (A1, A2, B1)] == [False, True, True]


def test_a_successor_takes_what_it_is_told_and_new_ones_once_it_may() -> None:
    versions = VersionFilter([A1], [B1])
    assert [versions.takes(key) for key in (A1, A2, B1)] == [True, False, False]
    versions.take_new()
    assert [versions.takes(key) for key in (A1, A2, B1)] == [True, True, False]


def test_a_version_that_somebody_asks_for_is_skipped_no_more() -> None:
    versions = VersionFilter(None, [A1, A2, B1])
    versions.stop_skipping("a", 2)
    assert [versions.takes(key) for key in (A1, A2, B1)] == [False, True, False]
    versions.stop_skipping("a", None)
    assert [versions.takes(key) for key in (A1, A2, B1)] == [True, True, False]
