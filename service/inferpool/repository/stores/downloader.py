"""Fetches files of a store into the cache: in parallel, going on after a cut, and verified."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

from inferpool.errors import StoreError, StoreUnreachable
from inferpool.repository.stores.content_cache import Blob, ContentCache, verify
from inferpool.repository.stores.progress import Progress
from inferpool.repository.stores.store import RemoteFile, Store, StoreChanged

log = logging.getLogger(__name__)

WORKERS: Final = 8
"""Requests at once."""
PART_BYTES: Final = 16 * 2**20
"""Large files are fetched in parts of this size."""
TRIES: Final = 6
"""How often in a row a request may bring nothing."""
LEAST_FREE_BYTES: Final = 2**28
"""What a file of unknown size leaves free on the disk."""
PAUSE_S: Final = 0.2
MOST_PAUSE_S: Final = 5.0


class Download:
    """A file that arrives: what is there already, and what is missing."""

    def __init__(self, file: RemoteFile, target: Path) -> None:
        """Go on with what an earlier process has left in `target`, if it is of the same content."""
        self.file = file
        self.descriptor, self.target = _open_alone(target)
        self._notes = self.target.with_name(f"{self.target.name}.parts")
        self._lock = threading.Lock()
        known = file.size is not None and file.resumable
        size = file.size or 0
        starts = range(0, size, PART_BYTES) if known and size else (0,)
        self._parts = {start: min(start + PART_BYTES, size) if known else file.size for start in starts}
        if not known:
            self._notes.unlink(missing_ok=True)
            os.ftruncate(self.descriptor, 0)
        self._missing = self._parts.keys() - self._done()

    def _done(self) -> set[int]:
        with contextlib.suppress(OSError, ValueError):
            return {int(line) for line in self._notes.read_text().split()} & self._parts.keys()
        return set()

    def missing(self) -> list[tuple[int, int | None]]:
        """The parts that have not arrived yet: from where to where."""
        return [(start, self._parts[start]) for start in sorted(self._missing)]

    def arrived(self, start: int) -> bool:
        """Note that a part has arrived; True if it was the last one."""
        if self.file.resumable:
            # A part counts only if it survives a loss of power.
            os.fdatasync(self.descriptor)
        with self._lock:
            with self._notes.open("a") as notes:
                notes.write(f"{start}\n")
            self._missing.discard(start)
            return not self._missing

    def finish(self) -> None:
        """Remove the notes; the file is complete."""
        self._notes.unlink(missing_ok=True)


def _open_alone(target: Path) -> tuple[int, Path]:
    """Open a file for writing that no other process writes: `target`, or one beside it."""
    while True:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have moved it into the cache since it was opened.
            if target.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor, target
        except BlockingIOError:
            target = target.with_name(f"{target.name}-{os.getpid()}")
        except FileNotFoundError:
            pass
        os.close(descriptor)


class Downloader:
    """Fetches files of one store."""

    def __init__(self, store: Store, origin: str, cache: ContentCache, progress: Progress) -> None:
        """`origin` names the store, without credentials."""
        self._store = store
        self._origin = origin
        self._cache = cache
        self._progress = progress
        self._stop = threading.Event()

    def fetch(self, files: Sequence[RemoteFile]) -> dict[RemoteFile, Path | Blob]:
        """Fetch `files`: an archive as a file, which the caller removes; all others as contents of the cache.

        Raises StoreError; what has arrived is kept for the next try.
        """
        self._cache.check_space(sum(file.size or 0 for file in files))
        results: dict[RemoteFile, Path | Blob] = {}
        downloads: list[Download] = []
        names = {
            file: file.key(self._origin) or f"unnamed-{os.getpid()}-{number}"
            for number, file in enumerate(files)
        }
        by_name = {name: file for file, name in names.items()}  # files of the same content arrive once
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                futures = []
                for name, file in by_name.items():
                    download = Download(file, self._cache.partial / name)
                    downloads.append(download)
                    missing = download.missing()
                    self._progress.expect(sum(end - start for start, end in missing if end is not None))
                    if not missing:  # it had arrived, and was not verified any more
                        results[file] = self._finish(download)
                    futures += [pool.submit(self._fetch_part, download, *part, results) for part in missing]
                try:
                    ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in ended:
                        future.result()
                except BaseException:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for download in downloads:
                os.close(download.descriptor)
        return {file: results[by_name[name]] for file, name in names.items()}

    def _fetch_part(
        self, download: Download, start: int, end: int | None, results: dict[RemoteFile, Path | Blob]
    ) -> None:
        file, position, failures = download.file, start, 0
        while not self._stop.is_set():
            before = position
            problem = "the connection has ended"
            try:
                for piece in self._store.read(file, position, end) if position != end else ():
                    if end is not None and position + len(piece) > end:
                        raise StoreError(f"{file.path}: more bytes than the {file.size} that were announced")
                    self._write(download.descriptor, piece, position)
                    if file.size is None and position % PART_BYTES + len(piece) >= PART_BYTES:
                        self._cache.check_space(LEAST_FREE_BYTES)
                    position += len(piece)
                    self._progress.add(len(piece))
                    if self._stop.is_set():
                        return
                if end is None or position == end:
                    if download.arrived(start):
                        results[file] = self._finish(download)
                    return
            except StoreChanged:
                raise
            except StoreUnreachable as error:
                problem = error.detail
            failures = 1 if position > before and file.resumable else failures + 1
            if failures >= TRIES:
                raise StoreUnreachable(f"{file.path}: given up after {TRIES} tries: {problem}")
            log.info("%s: cut at byte %d, which is fetched from there: %s", file.path, position, problem)
            if not file.resumable:
                position = start
                os.ftruncate(download.descriptor, 0)
            self._stop.wait(min(PAUSE_S * 2**failures, MOST_PAUSE_S))

    @staticmethod
    def _write(descriptor: int, piece: bytes | memoryview, position: int) -> None:
        rest = memoryview(piece)
        while rest:
            written = os.pwrite(descriptor, rest, position)
            rest, position = rest[written:], position + written

    def _finish(self, download: Download) -> Path | Blob:
        download.finish()
        try:
            if download.file.is_archive:
                verify(download.target, download.file.digest)
                return download.target
            return self._cache.add(download.target, download.file.digest)
        except StoreError as error:
            raise StoreError(f"{download.file.path}: {error.detail}") from None
