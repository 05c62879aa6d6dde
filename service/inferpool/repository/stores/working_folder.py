"""The local folder that a store's models are served from.

    KEY/lock            held while the folder is changed
    KEY/state.json      what the folder has, and what the store said then
    KEY/NAME/           the folder itself: a repository, or the folder of the one model

New versions, changed ones and files beside them each come by a rename. A server that watches the folder, or
loads from it at this moment, finds a version whole or not at all. What is in the folder beside that (labels
that were moved, for example) stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from inferpool.errors import StoreError
from inferpool.repository.stores.content_cache import Blob, ContentCache, write_whole

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@dataclass(frozen=True, slots=True)
class FolderState:
    """What a folder has.

    Attributes:
        stamp: what the store said of all its files; "" if nothing.
        depth: 1 if the folder has folders of models, 0 if it is the folder of one model.
        files: the SHA-256 of each file, by its path in the folder.
        fetched_at: seconds since 1970.
    """

    stamp: str = ""
    depth: int = 1
    files: Mapping[str, str] = field(default_factory=dict)
    fetched_at: float = 0.0


class WorkingFolder:
    """The folder of one reference.

    Attributes:
        path: where the models are.
        lock: the file of the lock.
    """

    def __init__(self, stores: Path, key: str, name: str) -> None:
        """`stores` is the part of the cache for stores, `key` names the reference, `name` its model."""
        self._folder = stores / "repositories" / key
        self._state_file = self._folder / "state.json"
        self.lock = self._folder / "lock"
        self.path = self._folder / name

    def state(self) -> FolderState | None:
        """What the folder has; None if it was never complete."""
        try:
            table = json.loads(self._state_file.read_bytes())
            state = FolderState(table["stamp"], table["depth"], table["files"], table["fetched_at"])
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return state if all((self.path / path).is_file() for path in state.files) else None

    def asked_at(self) -> float:
        """When the store was asked last, in seconds since 1970; 0 if never."""
        try:
            return self.lock.stat().st_mtime
        except OSError:
            return 0.0

    def note_asked(self) -> None:
        """Note that the store is asked now."""
        os.utime(self.lock)

    def update(self, stamp: str, depth: int, files: Mapping[str, Blob], cache: ContentCache) -> bool:
        """Give the folder these files, and no others; returns whether anything had to change.

        The caller holds the lock. Raises StoreError.
        """
        old = self.state()
        new = FolderState(stamp, depth, {path: blob.sha256 for path, blob in files.items()}, time.time())
        try:
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".new-") as staging:
                changed = self._place(old, new, files, cache, Path(staging))
            # A copy of it in an image must be readable for others.
            write_whole(self._state_file, json.dumps(_table(new), indent=1).encode())
        except OSError as error:
            raise StoreError(f"{self._folder} cannot take the models: {error.strerror}") from error
        return changed

    def _place(
        self,
        old: FolderState | None,
        new: FolderState,
        files: Mapping[str, Blob],
        cache: ContentCache,
        staging: Path,
    ) -> bool:
        if old is None or old.depth != new.depth or not self.path.is_dir():
            build_folder(staging / "whole", files, cache)
            (staging / "whole").chmod(0o755)
            _put(staging / "whole", self.path, staging)
            return True
        before, after = _units(old.files, old.depth), _units(new.files, new.depth)
        changed = sorted(
            (unit for unit, paths in after.items() if before.get(unit) != paths), key=_versions_first
        )
        fresh = {unit.partition("/")[0] for unit in changed if "/" in unit}
        fresh = {model for model in fresh if not (self.path / model).exists()}
        for number, unit in enumerate(
            [*(unit for unit in changed if unit.partition("/")[0] not in fresh), *sorted(fresh)]
        ):
            inside = {path: files[path] for path in files if path == unit or path.startswith(f"{unit}/")}
            made = staging / str(number)
            if unit in files:
                _link(cache.path(files[unit].sha256), made)
            else:
                build_folder(made, {path[len(unit) + 1 :]: blob for path, blob in inside.items()}, cache)
            _put(made, self.path / unit, staging)
        gone = before.keys() - after.keys()
        for number, unit in enumerate(sorted(gone)):
            with contextlib.suppress(FileNotFoundError):
                (self.path / unit).rename(staging / f"gone-{number}")
        for model in {unit.partition("/")[0] for unit in gone if "/" in unit}:
            # A model without any version; what a server has noted of it goes, too.
            if not any(unit.startswith(f"{model}/") for unit in after):
                with contextlib.suppress(FileNotFoundError):
                    (self.path / model).rename(staging / f"model-{model}")
        return bool(changed or gone)


def _table(state: FolderState) -> dict[str, object]:
    return {
        "stamp": state.stamp,
        "depth": state.depth,
        "files": dict(state.files),
        "fetched_at": state.fetched_at,
    }


def _units(files: Mapping[str, str], depth: int) -> dict[str, dict[str, str]]:
    """What is exchanged in one step: the folders of versions, other folders, and files beside them."""
    units: dict[str, dict[str, str]] = {}
    for path, sha256 in files.items():
        unit = "/".join(path.split("/")[: depth + 1])
        units.setdefault(unit, {})[path] = sha256
    return units


def _versions_first(unit: str) -> tuple[bool, str]:
    """A `model.toml` may name a version that comes with it."""
    return not unit.rpartition("/")[2].isdecimal(), unit


def build_folder(folder: Path, files: Mapping[str, Blob], cache: ContentCache) -> None:
    """Make `folder` of contents of the cache, by their paths in it; each is a link where that is possible."""
    folder.mkdir()
    for path, blob in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(cache.path(blob.sha256), target)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links, or with too many of them
        shutil.copy2(source, target)


def _put(made: Path, target: Path, staging: Path) -> None:
    """Put `made` in the place of `target`, whatever that is."""
    if made.is_dir() and target.is_dir() and _exchange(made, target):
        return
    if made.is_dir() or target.is_dir():
        # A watch takes no version for deleted that is away for so short a time.
        with contextlib.suppress(FileNotFoundError):
            target.rename(staging / f"old-{made.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    made.replace(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False if the system or the file system cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
