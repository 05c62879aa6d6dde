"""A catalog in a file without a name: JSON of any size, and the files that codecs are made from.

A socket takes messages of limited size, but it passes descriptors. So a process writes the catalog into
memory (a memfd), seals it, and sends its descriptor. Nobody can change the memory afterwards, and no process
has to be alive for another to read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

MOST_BYTES: Final = 2**31
"""Bytes of a parcel. Tokenizers and lists of labels take most of them."""
_MOST_HEADER_BYTES: Final = 16 * 2**20
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Parcel(NamedTuple):
    """The content of a parcel: a catalog as JSON values, and files by their SHA-256 digests."""

    catalog: dict[str, Any]
    files: dict[str, bytes]


def pack(catalog: Mapping[str, Any], files: Mapping[str, bytes]) -> int:
    """A descriptor of a new, sealed memory file with `catalog` and `files`; the caller closes it.

    Raises OSError if there is no memory or no descriptor left.
    """
    body = json.dumps(catalog, separators=(",", ":")).encode()
    sizes = [[digest, len(content)] for digest, content in files.items()]
    header = json.dumps({"catalog": len(body), "files": sizes}).encode() + b"\n"
    descriptor = os.memfd_create("inferpool-catalog", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in (header, body, *files.values()):
            _write(descriptor, part)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unpack(descriptor: int) -> Parcel:
    """Read the memory file `descriptor`; raises ValueError if it is not a sealed, complete parcel."""
    with contextlib.suppress(OSError):
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS:
            return _read(descriptor)
    raise ValueError("not a sealed memory file")


def _read(descriptor: int) -> Parcel:
    size = os.fstat(descriptor).st_size
    if size > MOST_BYTES:
        raise ValueError(f"a catalog of {size} bytes; expected at most {MOST_BYTES}")
    content = memoryview(_read_all(descriptor, size))
    end = bytes(content[:_MOST_HEADER_BYTES]).find(b"\n")
    try:
        header = json.loads(bytes(content[: max(end, 0)]))
        start = end + 1
        body = content[start : start + header["catalog"]]
        start += header["catalog"]
        files: dict[str, bytes] = {}
        for digest, length in header["files"]:
            files[digest] = bytes(content[start : start + length])
            start += length
            if hashlib.sha256(files[digest]).hexdigest() != digest:
                raise ValueError("the content of a file does not have its digest")
        if start != size:
            raise ValueError(f"{size} bytes; expected {start}")
        catalog = json.loads(bytes(body))
    except (TypeError, LookupError) as error:
        raise ValueError(f"not a catalog: {error!r}") from error
    return Parcel(catalog, files)


def _read_all(descriptor: int, size: int) -> bytes:
    """All bytes of the file, whose offset is left alone: all processes with the descriptor share it."""
    parts: list[bytes] = []
    read = 0
    while read < size:
        part = os.pread(descriptor, size - read, read)
        if not part:
            break
        parts.append(part)
        read += len(part)
    return b"".join(parts)


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
