"""A watch listens to the folder that its path names, also when that is another one later."""

from __future__ import annotations

import itertools
import shutil
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


def test_a_watch_follows_a_folder_that_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems such as ext4 give the new folder the number of the deleted one."""
    monkeypatch.setattr(watch, "RESCAN_S", 3600.0)
    folder, looks, numbers = tmp_path / "models", list[set[str]](), itertools.count()

    def look(settled: SettledSources) -> bool:
        looks.append({item.name for item in folder.iterdir()})
        return False

    def has_events(word: str) -> bool:
        (folder / f"{word}-{next(numbers)}").touch()
        return any(name.startswith(word) for names in looks for name in names)

    folder.mkdir()
    watched = FolderWatch(folder, look)
    watched.start()
    try:
        wait_until(partial(has_events, "first"), "events of the first folder")
        shutil.rmtree(folder)
        folder.mkdir()
        watched.look()  # the deletion may have been noticed before there was a new folder
        for word in ("second", "third", "fourth"):
            wait_until(partial(has_events, word), "events of the second folder", 30)
    finally:
        watched.close()
