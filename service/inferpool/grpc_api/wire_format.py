"""Finds the raw contents in a serialized `ModelInferRequest`, before protobuf parses the rest.

The raw contents, which are most of a large message, are views of it: protobuf would copy them twice. And a
message of tiny members takes thirty times its size once it is parsed, so their number is limited first. Only
the outermost fields are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from inferpool.errors import MalformedBody

RawContents: TypeAlias = Sequence[memoryview]
"""One member for each input; empty if the request has typed contents."""

MOST_FIELDS: Final = 12_288
"""The most inputs, outputs, raw contents and parameters that a message may have together."""
_RAW_INPUT_CONTENTS: Final = 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_VARINT_BYTES: Final = 10


def split_raw(data: bytes) -> tuple[bytes, list[memoryview]]:
    """Return the message without its raw contents, and the raw contents as views of `data`.

    Raises MalformedBody if `data` is no message, or one of too many members.
    """
    view = memoryview(data)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    at = kept = fields = 0
    end = len(data)
    while at < end:
        fields += 1
        if fields > MOST_FIELDS:
            raise MalformedBody(f"the message has more than {MOST_FIELDS} members; send fewer")
        begin = at
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            at += size
            if at > end:
                raise MalformedBody("the message is truncated", expected=at, got=end)
            if tag >> 3 == _RAW_INPUT_CONTENTS:
                raw.append(view[at - size : at])
                rest.append(view[kept:begin])
                kept = at
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        else:
            raise MalformedBody("the message has a field of an unknown kind; is it a ModelInferRequest?")
    if not raw:
        return data, raw
    rest.append(view[kept:])
    return b"".join(rest), raw


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at the byte `at`, and where the next field begins."""
    number = shift = 0
    for byte in data[at : at + _MOST_VARINT_BYTES]:
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise MalformedBody("the message has an incomplete number; is it a ModelInferRequest?")
