"""W3C Trace Context: which trace a request belongs to."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# Of later versions what is known is read, and what follows is not.
_TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 0x01


class Trace(NamedTuple):
    """Where a request stands in a trace.

    Attributes:
        id: 32 hexadecimal digits.
        parent: the caller's span, 16 hexadecimal digits; "" where the trace begins with the request.
        sampled: whether the trace is kept by whoever began it.
    """

    id: str
    parent: str
    sampled: bool


def read_traceparent(value: bytes) -> Trace | None:
    """What a `traceparent` header says (W3C Trace Context, 3.2.2); None if it is not valid."""
    found = _TRACEPARENT.fullmatch(value.strip())
    if found is None:
        return None
    version, trace, parent, flags, rest = found.groups()
    if version == b"ff" or (version == b"00" and rest is not None):
        return None
    if not trace.strip(b"0") or not parent.strip(b"0"):
        return None
    return Trace(trace.decode(), parent.decode(), bool(int(flags, 16) & _SAMPLED))
