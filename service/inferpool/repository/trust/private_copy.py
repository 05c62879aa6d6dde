"""A copy of a version's files in a folder that only the user of the server may open.

Whoever may write the models folder can exchange a file between its check and its load. So files that must be
what was checked are copied once. The copy is hashed, compared, and loaded; then it is removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from inferpool.errors import LoadError
from inferpool.repository.trust.manifest import path_of
from inferpool.system.cpu import usable_cores
from inferpool.system.files import printable

log = logging.getLogger(__name__)

PREFIX: Final = "inferpool-copy-"
_LEFT_BEHIND_S: Final = 60.0
"""Age of a folder without an owner before it counts as left behind by a process that was killed."""
_CHUNK_BYTES: Final = 2**30
_READ_BYTES: Final = 2**20
_MOST_THREADS: Final = 4


class PrivateCopy:
    """The files of one version, as they were at one moment.

    Attributes:
        file: the model file in the copy.
        folder: the folder of the model in the copy.
        digests: the SHA-256 digest of each file, by its name in a manifest.
    """

    def __init__(self, file: Path, names: Mapping[str, Path], cache_dir: Path | None = None) -> None:
        """Copy `names`, which are paths by names in a manifest; `file` is the model file among them.

        The copy is in the folder for temporary files, or in `cache_dir` if there is none. Raises LoadError,
        which names the file, if one cannot be copied, or if there is too little room.
        """
        version, model = file.parent.name or "_", file.parent.parent.name or "_"
        try:
            parent = temporary_folder(cache_dir)
            _remove_left_behind(parent)
            self._root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            raise LoadError(
                "a copy of the version, which is what is checked and loaded, cannot be made:"
                f" {error.strerror}; the variable TMPDIR names a folder that can be written"
            ) from error
        self._lock = os.open(self._root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            self.folder = self._root / model
            self.file = self.folder / version / file.name
            self.file.parent.mkdir(parents=True)
            _check_room(self._root, names)
            inside = file.parent.parent.resolve()
            threads = max(1, min(_MOST_THREADS, usable_cores(), len(names)))
            with ThreadPoolExecutor(threads, "copy") as pool:
                copies = {
                    name: pool.submit(_copy, name, path, path_of(self.file.parent, name), inside)
                    for name, path in names.items()
                }
                self.digests = {name: copy.result() for name, copy in copies.items()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the copy. What is loaded of it stays."""
        if self._lock >= 0:
            shutil.rmtree(self._root, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def temporary_folder(cache_dir: Path | None) -> Path:
    """The folder for temporary files (`TMPDIR`, `/tmp`), or `cache_dir` if there is none that can be written.

    Raises OSError if there is neither.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        if cache_dir is None:
            raise
        cache_dir.mkdir(parents=True, exist_ok=True)
        return cache_dir


def _copy(name: str, path: Path, target: Path, inside: Path) -> str:
    """Copy a file to `target`, and return the SHA-256 digest of the copy."""
    if name.startswith("../") and not path.resolve().is_relative_to(inside):
        raise LoadError(f"{printable(name)} leads out of the folder of the model")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise LoadError(f"{printable(name)} is missing; it was signed with the version") from error
    except OSError as error:
        raise LoadError(f"{printable(name)} cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise LoadError(f"{printable(name)} is not a regular file")
        with target.open("xb") as copy:
            _copy_content(source, copy.fileno())
        with target.open("rb") as copy:
            return hashlib.file_digest(copy, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(
            f"{printable(name)} cannot be copied, which is to be checked and loaded: {error.strerror}"
        ) from error
    finally:
        os.close(source)


def _copy_content(source: int, target: int) -> None:
    """Copy all that is left to read. Some file systems do so without copying anything."""
    try:
        while os.copy_file_range(source, target, _CHUNK_BYTES):
            pass
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
        while content := os.read(source, _READ_BYTES):
            view = memoryview(content)
            while view:
                view = view[os.write(target, view) :]


def _check_room(root: Path, names: Mapping[str, Path]) -> None:
    """Raise LoadError if the files cannot fit where copies are made."""
    needed = sum(path.stat().st_size for path in names.values() if path.is_file())
    free = shutil.disk_usage(root).free
    if needed > free:
        raise LoadError(
            f"a copy of the version, which is what is checked and loaded, needs {needed} bytes in"
            f" {root.parent}, which has {free}; the variable TMPDIR names another folder"
        )


def _remove_left_behind(parent: Path) -> None:
    """Remove the copies of processes that were killed: nobody holds the locks of their folders."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # removed meanwhile, or another user's
        try:
            status = os.fstat(opened)
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _LEFT_BEHIND_S:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                log.info("%s is removed; a process that was killed had left it", folder)
        except OSError:
            pass  # another process uses it
        finally:
            os.close(opened)
