"""Copies and reads large bodies in pieces, between which other threads can run.

One copy of 64 MiB holds the GIL for 20 to 50 milliseconds, because each page of the copy is touched for the
first time. This module is not compiled: compiled loops do not let other threads run.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterator
from io import BytesIO
from typing import Any, Final

from inferpool.errors import InvalidInput
from inferpool.tensors import MOST_ROWS

PIECE_BYTES: Final = 256 * 1024
"""Bytes that are copied at a time; they take a fifth of a millisecond."""
_FREED_ITEMS: Final = 4096
_MOST_LINES: Final = 2 * MOST_ROWS
"""Lines of a body, blank ones included."""


def as_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """Return `data` itself if it is `bytes`, else a copy."""
    if isinstance(data, bytes):
        return data
    if len(data) <= PIECE_BYTES:
        return bytes(data)
    copy = BytesIO()
    for piece in pieces(data):
        copy.write(piece)
    return copy.getvalue()


def pieces(data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """Yield views of `data`, one piece after the other."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]


def count(data: bytes, wanted: bytes) -> int:
    """Return how often the single byte `wanted` comes in `data`."""
    # A search of a slice needs no copy.
    return sum(data.count(wanted, at, at + PIECE_BYTES) for at in range(0, len(data), PIECE_BYTES))


def not_utf8_at(data: bytes) -> int:
    """Return the offset of the first byte that is not UTF-8; -1 if all of `data` is."""
    decoder = getincrementaldecoder("utf-8")()
    for start in range(0, max(1, len(data)), PIECE_BYTES):
        waiting = len(decoder.getstate()[0])
        try:
            decoder.decode(data[start : start + PIECE_BYTES], start + PIECE_BYTES >= len(data))
        except UnicodeDecodeError as error:
            return start - waiting + error.start
    return -1


def free(items: list[Any]) -> None:
    """Empty a list in pieces: the end of a million objects holds the GIL, too."""
    while items:
        del items[-_FREED_ITEMS:]


def lines_as_list(content: bytes, name: bytes) -> bytes:
    """Return the JSON object whose only field `name` is the list of the lines in `content`; skips blank ones.

    Raises InvalidInput if there are too many.
    """
    lines = count(content, b"\n")
    if lines > _MOST_LINES:
        raise InvalidInput(
            f"the body has {lines} lines; at most {_MOST_LINES} are taken, blank ones included; send them in"
            " several requests",
            expected=_MOST_LINES,
            got=lines,
        )
    if not lines:
        return b"".join((b'{"%b":[' % name, content, b"]}"))
    joined = BytesIO()
    joined.write(b'{"%b":[' % name)
    before = b""
    for line in BytesIO(content):
        text = line.strip()
        if text:
            joined.write(before)
            for piece in pieces(text):
                joined.write(piece)
            before = b","
    joined.write(b"]}")
    return joined.getvalue()
