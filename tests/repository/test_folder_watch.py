"""A watch listens to the folder that its path names, also when that is another one later."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
from inferpool.repository import watch
from inferpool.repository.settled_sources import SettledSources
from inferpool.repository.watch import FolderWatch

from tests.server import wait_until


def test_a_watch_follows_a_link_that_is_switched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As git-sync does. Without events, the folder would be looked at in an hour."""
    monkeypatch.setattr(watch, "RESCAN_S", 3600.0)
    link, looks, numbers = tmp_path / "link", list[set[str]](), itertools.count()

    def look(settled: SettledSources) -> bool:
        looks.append({item.name for item in link.iterdir()})
        return False

    def has_events(folder: str, word: str) -> bool:
        # A file may come before somebody listens, so there is another one for each question.
        (tmp_path / folder / f"{word}-{next(numbers)}").touch()
        return any(name.startswith(word) for names in looks for name in names)

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    link.symlink_to("old")
    watched = FolderWatch(link, look)
    watched.start()
    try:
        wait_until(lambda: has_events("old", "first"), "events of the first folder")
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(link)
        watched.look()
        wait_until(lambda: looks[-1] == set(), "the second folder, which is empty, is looked at")
        for word in ("second", "third", "fourth"):  # late events of the first folder do not reach so far
            wait_until(partial(has_events, "new", word), "events of the second folder", 30)
    finally:
        watched.close()
