"""The `traceparent` header of W3C Trace Context: the trace that a request belongs to."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# A later version may append fields, which are ignored.
_TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 0x01


class Trace(NamedTuple):
    """The position of a request in a trace.

    Attributes:
        id: 32 hexadecimal digits.
        parent: the caller's span, 16 hexadecimal digits; "" if the trace begins with the request.
        sampled: whether the caller records the trace.
    """

    id: str
    parent: str
    sampled: bool


def read_traceparent(value: bytes) -> Trace | None:
    """Parse a `traceparent` header (W3C Trace Context, 3.2.2); None if it is invalid."""
    found = _TRACEPARENT.fullmatch(value.strip())
    if found is None:
        return None
    version, trace, parent, flags, rest = found.groups()
    if version == b"ff" or (version == b"00" and rest is not None):
        return None
    if not trace.strip(b"0") or not parent.strip(b"0"):
        return None
    return Trace(trace.decode(), parent.decode(), bool(int(flags, 16) & _SAMPLED))
