"""Unpacks archives with bounds: an archive can neither write elsewhere nor fill the disk or the memory.

Only files and folders are taken. A link, a device or a name that leads out of the folder refuses the whole
archive, because an archive of models has no reason for any of them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final, cast

from inferpool.errors import StoreError
from inferpool.repository.stores.arrangement import MOST_FILES, check_path
from inferpool.repository.stores.content_cache import Blob, ContentCache
from inferpool.system.files import printable

MOST_RATIO: Final = 20
"""How many times larger than the archive its content may be. Weights shrink by half at best."""
ALWAYS_BYTES: Final = 2**30
"""Content of this size is taken from any archive."""
_TOO_LARGE: Final = (
    f"its content is larger than {ALWAYS_BYTES / 1e9:.1f} GB and {MOST_RATIO} times the archive"
)

Keep = Callable[[str], "str | None"]
"""The path of a file of an archive in the result, or None if the file is left out."""


def keep_all(path: str) -> str | None:
    """Keep every file under its own name."""
    return path


class _Bounded(io.RawIOBase):
    """A stream that fails once it has given more bytes than it may."""

    def __init__(self, stream: IO[bytes], most_bytes: int) -> None:
        self._stream = stream
        self._left = most_bytes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise StoreError(_TOO_LARGE)
        return data


def unpack(archive: Path, cache: ContentCache, keep: Keep = keep_all) -> list[Blob]:
    """Unpack a tar archive (plain, gzip, bzip2 or xz) or a zip into the cache.

    The content tells which it is. Raises StoreError.
    """
    size = archive.stat().st_size
    most_bytes = max(ALWAYS_BYTES, MOST_RATIO * size)
    try:
        with archive.open("rb") as opened:
            start = opened.read(512)
            opened.seek(0)
            if start.startswith(b"PK\x03\x04"):
                return list(_unzip(opened, most_bytes, cache, keep))
            with _decompressed(start, opened) as stream:
                return list(_untar(_Bounded(stream, most_bytes), cache, keep))
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise StoreError(f"the archive is damaged: {error}") from error
    except OSError as error:
        if error.errno is None:  # a decompressor's
            raise StoreError(f"the archive is damaged: {error}") from error
        raise StoreError(f"the archive cannot be unpacked: {error.strerror}") from error
    except (NotImplementedError, RuntimeError) as error:  # of zipfile: an unknown method, a password
        raise StoreError(f"the archive cannot be read: {error}") from error


def _decompressed(start: bytes, opened: IO[bytes]) -> IO[bytes]:
    if start.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=opened))
    if start.startswith(b"BZh"):
        return bz2.BZ2File(opened)
    if start.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(opened)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        raise StoreError("the archive is compressed by zstd, which cannot be read; use gzip")
    if start[257:262] == b"ustar" or not any(start):
        return opened
    raise StoreError("it is neither a tar archive nor a zip")


def _untar(stream: _Bounded, cache: ContentCache, keep: Keep) -> Iterator[Blob]:
    seen: set[str] = set()
    with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
        for number, member in enumerate(archive):
            _check_count(number)
            path = _plain(member.name)
            kept = keep(path)
            if member.isdir() or kept is None:
                continue
            try:
                tarfile.data_filter(member, str(cache.folder))
            except tarfile.FilterError as error:
                raise StoreError(f"the archive is refused: {printable(str(error))}") from error
            if not member.isreg() or member.issparse():  # holes have no end that is bounded here
                raise StoreError(f"the archive is refused: {printable(path)} is a link or has holes")
            _check(kept, seen)
            content = archive.extractfile(member)
            assert content is not None
            yield cache.add_stream(cast("io.BufferedReader", content), kept)


def _unzip(opened: IO[bytes], most_bytes: int, cache: ContentCache, keep: Keep) -> Iterator[Blob]:
    seen: set[str] = set()
    with zipfile.ZipFile(opened) as archive:
        _check_count(len(archive.infolist()))
        if sum(member.file_size for member in archive.infolist()) > most_bytes:
            raise StoreError(_TOO_LARGE)
        for member in archive.infolist():
            path = _plain(member.filename)
            kept = keep(path)
            if member.is_dir() or kept is None:
                continue
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise StoreError(f"the archive is refused: {printable(path)} is not a file")
            _check(kept, seen)
            with archive.open(member) as content:
                yield cache.add_stream(cast("io.BufferedReader", _Bounded(content, member.file_size)), kept)


def _plain(path: str) -> str:
    while path.startswith("./"):
        path = path[2:]
    return path


def _check(path: str, seen: set[str]) -> None:
    check_path(path)
    if path in seen:
        raise StoreError(f"the archive is refused: it has {printable(path)} twice")
    seen.add(path)


def _check_count(number: int) -> None:
    if number > MOST_FILES:
        raise StoreError(f"the archive has more than {MOST_FILES} entries")
