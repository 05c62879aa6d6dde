"""Keeps what was fetched by its content: a file that was fetched once is not fetched again.

blobs/SHA256        the contents, read-only; the folders of repositories link to them
index/KEY.json      which contents a file of a store has: the key follows from what the store says of it
partial/KEY         what has arrived of a file, until it is complete
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from inferpool.errors import StoreError
from inferpool.repository.stores.store import GIT_BLOB, SHA256

UNUSED_S: Final = 24 * 3600.0
"""How long contents that no repository uses any more are kept: a rollback needs them soon or never."""
_READ_BYTES: Final = 2**20
_READ_ONLY: Final = (errno.EROFS, errno.EACCES, errno.EPERM)


class Blob(NamedTuple):
    """A file as its content: the path within its archive or "", the SHA-256, and the size in bytes."""

    path: str
    sha256: str
    size: int


class ContentCache:
    """The folder. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs"
        self._index = folder / "index"
        self.partial = folder / "partial"

    def prepare(self) -> bool:
        """Make the folders; False if the cache can only be read. Raises StoreError for other faults."""
        try:
            for folder in (self._blobs, self._index, self.partial):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.partial):
                return True
        except OSError as error:
            if error.errno in _READ_ONLY:
                return False
            raise StoreError(f"{self.folder} cannot hold models: {error.strerror}") from error

    def path(self, sha256: str) -> Path:
        """Where a content is kept."""
        return self._blobs / sha256

    def find(self, key: str) -> list[Blob] | None:
        """The contents of a file, several if it is an archive; None unless all of them are here."""
        if not key:
            return None
        try:
            blobs = [Blob(*line) for line in json.loads((self._index / f"{key}.json").read_bytes())]
            complete = all(self.path(blob.sha256).stat().st_size == blob.size for blob in blobs)
        except (OSError, ValueError, TypeError):
            return None
        return blobs if complete else None

    def remember(self, key: str, blobs: list[Blob]) -> None:
        """Note the contents of a file."""
        if key:
            write_whole(self._index / f"{key}.json", json.dumps(blobs).encode())

    def add(self, file: Path, digest: str) -> Blob:
        """Move a complete `file` into the cache; raises StoreError unless it has the `digest`, if any."""
        sha256 = verify(file, digest)
        size = file.stat().st_size
        self._keep(file, sha256)
        return Blob("", sha256, size)

    def add_stream(self, stream: BinaryIO, path: str) -> Blob:
        """Copy a file of an archive into the cache; `stream` sees to it that it has an end."""
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.partial, prefix="unpack-", delete=False) as made:
            try:
                while piece := stream.read(_READ_BYTES):
                    digest.update(piece)
                    made.write(piece)
                    size += len(piece)
            except BaseException:
                Path(made.name).unlink()
                raise
        self._keep(Path(made.name), digest.hexdigest())
        return Blob(path, digest.hexdigest(), size)

    def _keep(self, file: Path, sha256: str) -> None:
        target = self.path(sha256)
        if target.exists() and target.stat().st_size == file.stat().st_size:
            file.unlink()
            return
        file.chmod(0o444)
        file.replace(target)

    def check_space(self, size: int) -> None:
        """Raise StoreError if `size` more bytes do not fit."""
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise StoreError(
                f"{size / 1e6:.0f} MB are to be fetched, and {self.folder} has room for {free / 1e6:.0f} MB;"
                " make room, or choose another folder with --cache-dir"
            )

    def remove_unused(self) -> None:
        """Delete contents that no repository has used for a day, and what was left half fetched as long."""
        now = time.time()
        with contextlib.suppress(OSError):
            for file in (*self._blobs.iterdir(), *self.partial.iterdir()):
                with contextlib.suppress(OSError):
                    status = file.stat()
                    # The time of the last change of the node: when the last link to it was removed.
                    if status.st_nlink == 1 and now - status.st_ctime > UNUSED_S:
                        file.unlink()
            for file in self._index.iterdir():
                if self.find(file.stem) is None and now - file.stat().st_mtime > UNUSED_S:
                    file.unlink()


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time; it ends with the process, too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def write_whole(target: Path, content: bytes) -> None:
    """Write a file at once: a reader sees the old content or the new one."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as made:
        made.write(content)
    Path(made.name).chmod(0o644)
    Path(made.name).replace(target)


def verify(file: Path, digest: str) -> str:
    """The SHA-256 of a file; raises StoreError and removes it unless it has the `digest`, if any."""
    kind, _, expected = digest.partition(":")
    with file.open("rb") as opened:
        found = sha256 = hashlib.file_digest(opened, SHA256).hexdigest()
        if kind == GIT_BLOB:
            opened.seek(0)
            git = hashlib.sha1(f"blob {os.fstat(opened.fileno()).st_size}\0".encode(), usedforsecurity=False)
            while piece := opened.read(_READ_BYTES):
                git.update(piece)
            found = git.hexdigest()
    if digest and found != expected:
        file.unlink()
        raise StoreError(f"it arrived damaged: the digest is {found[:12]}…, expected {expected[:12]}…")
    return sha256
