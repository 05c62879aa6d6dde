"""Checks of `join` in `_socketio`: whatever the pieces are, C puts together what Python would."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any


def check_join(module: ModuleType, chance: random.Random) -> None:
    """Compare a response of random pieces, some of which no response may have, with Python's."""
    headers: list[Any] = [(_piece(chance), _piece(chance)) for _ in range(chance.choice((0, 1, 3, 16, 17)))]
    parts: list[Any] = [_piece(chance) for _ in range(chance.choice((0, 1, 2, 16, 17)))]
    is_odd = chance.random() < 0.1
    if is_odd:
        parts.append(chance.choice(("text", None, 1, bytearray(b"bytes"))))
    prefix, size = _piece(chance), chance.choice((0, 9, 10, 2**31, 2**63 - 1))
    whole = module.join(prefix, headers, b"length: ", size, parts)
    if is_odd or len(headers) > 16 or len(parts) > 16:
        assert whole is None
        return
    lines = [b"%b: %b\r\n" % pair for pair in headers if not {*b"".join(pair)} & {*b"\r\n\0"}]
    assert whole == b"".join((prefix, *lines, b"length: %d\r\n\r\n" % size, *parts))


def _piece(chance: random.Random) -> bytes:
    return bytes(chance.choices(b"ab\r\n\0", (50, 50, 1, 1, 1), k=chance.choice((0, 1, 20, 300))))
