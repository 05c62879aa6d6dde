"""Request ids: the caller's where it is fit to be sent back, else a new one."""

from __future__ import annotations

import os
import re
from typing import Final

_HEX: Final = [f"{byte:02x}" for byte in range(256)]
_SAFE_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
"""Ids that may be sent in a header and stand in a log line: visible ASCII of bounded length."""


class _RequestIds:
    """Makes ids from random digits, the same for one server, and a counter; for the event loop alone.

    256 ids in a row differ only in their last two digits, so the rest is formatted once for all of them.
    """

    __slots__ = ("_next", "_random", "_stem")

    def __init__(self) -> None:
        self._random = os.urandom(4).hex()
        self._next = 0
        self._stem = ""

    def new(self) -> str:
        serial = self._next
        self._next = serial + 1
        last = serial & 255
        if last == 0:
            self._stem = f"{self._random}{serial >> 8:06x}"
        return self._stem + _HEX[last]


_request_ids: Final = _RequestIds()


def new_request_id() -> str:
    """Return an id that no other request of this server has; another server is unlikely to make it."""
    return _request_ids.new()


def given_request_id(value: bytes | None) -> str | None:
    """Return the caller's `X-Request-Id`, or None if there is none or it is not fit to be sent back."""
    if value is not None:
        text = value.decode("latin-1")
        if _SAFE_ID.fullmatch(text):
            return text
    return None


def request_id_from(value: bytes | None) -> str:
    """Return the caller's `X-Request-Id` if it is fit to be sent back, else a new id."""
    return given_request_id(value) or new_request_id()
