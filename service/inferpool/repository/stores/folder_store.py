"""A folder or a file of this machine, read as a store is: nothing is taken that is not a plain file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from inferpool.errors import StoreError
from inferpool.repository.stores.arrangement import MOST_FILES
from inferpool.repository.stores.reference import StoreReference, is_archive
from inferpool.repository.stores.store import RemoteFile, StoreChanged
from inferpool.system.files import printable

_READ_BYTES: Final = 2**20
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class FolderStore:
    """The files below a path. Links are refused: what they name may lie anywhere."""

    def __init__(self, reference: StoreReference) -> None:
        self._root = Path(reference.path)

    def list_files(self) -> list[RemoteFile]:
        """All files below the folder but hidden ones, or the one file."""
        try:
            status = self._root.lstat()
            if not stat.S_ISDIR(status.st_mode):
                return [_remote(self._root.name, status, is_archive=is_archive(self._root.name))]
            return list(self._walk(""))
        except OSError as error:
            raise StoreError(f"{printable(str(self._root))} cannot be read: {error.strerror}") from None

    def _walk(self, folder: str) -> Iterator[RemoteFile]:
        count = 0
        folders = [folder]
        while folders:
            folder = folders.pop()
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    count += 1
                    if count > MOST_FILES:
                        raise StoreError(f"more than {MOST_FILES} files; name a folder with fewer")
                    path = f"{folder}{entry.name}"
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(f"{path}/")
                    else:
                        yield _remote(path, status)

    def read(self, file: RemoteFile, start: int, end: int | None) -> Iterator[bytes]:
        """The bytes of a file from `start` to before `end`; raises StoreChanged if it is another one now."""
        path = self._root / file.path if self._root.is_dir() else self._root
        try:
            descriptor = os.open(path, _FLAGS)
        except OSError as error:
            raise StoreError(f"{printable(str(path))} cannot be read: {error.strerror}") from None
        try:
            position = start
            if _remote(file.path, os.fstat(descriptor)).stamp != file.stamp:
                raise StoreChanged(f"{printable(str(path))} has changed since it was listed")
            while end is None or position < end:
                most = _READ_BYTES if end is None else min(_READ_BYTES, end - position)
                piece = os.pread(descriptor, most, position)
                if not piece:
                    return
                yield piece
                position += len(piece)
            if _remote(file.path, os.fstat(descriptor)).stamp != file.stamp:
                raise StoreChanged(f"{printable(str(path))} has changed while it was read")
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Do nothing: no file is kept open."""


def _remote(path: str, status: os.stat_result, *, is_archive: bool = False) -> RemoteFile:
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{printable(path)} is no plain file; copy what it names in its place")
    stamp = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    return RemoteFile(path, status.st_size, stamp, is_archive=is_archive)
