"""A cache of parsed request heads, found by their bytes.

A client sends nearly the same head with every request: only the body differs, and with it Content-Length. A
cached head needs no parser. Every entry was read by the parser once. An entry is used only if the same bytes,
apart from the digits of Content-Length, begin the received data, and exactly the announced body follows.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from inferpool.http.access.caller import Caller
from inferpool.http.predict.api import InferenceApi
from inferpool.http.predict.request_head import RequestHead

MOST_HEADS: Final = 256
"""Heads in each of the two tables. A full table is emptied, because most of its heads were sent once."""
MOST_HEAD_BYTES: Final = 1024
"""Longer heads are not kept, to bound the memory of the cache."""

_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ?([0-9]{1,9})\r\n", re.IGNORECASE)


class CachedHead(NamedTuple):
    """A parsed head, how many bytes of body follow it, and the caller whose key is in the head."""

    api: InferenceApi
    head: RequestHead
    body_bytes: int
    caller: Caller


class HeadCache:
    """The heads known to a server; for the event loop alone."""

    __slots__ = ("_by_bytes", "_without_length")

    def __init__(self) -> None:
        self._by_bytes: dict[bytes, CachedHead] = {}
        # Keys lack the digits of Content-Length. The parser accepts no head that has this field twice.
        self._without_length: dict[bytes, CachedHead] = {}

    def find(self, data: bytes) -> tuple[CachedHead, bytes] | None:
        """Return the head and body of `data`, or None unless it is one complete request with a known head."""
        end = data.find(_END) + 4
        if end > MOST_HEAD_BYTES:
            return None
        head = data[:end]
        size = len(data) - end
        cached = self._by_bytes.get(head) or self._find_other_length(head, size)
        return (cached, data[end:]) if cached is not None and size == cached.body_bytes else None

    def remember(
        self, data: bytes, body: bytes, api: InferenceApi, head: RequestHead, caller: Caller
    ) -> None:
        """Keep the head of the request `data`, which the parser has read as `head` and, in one piece, `body`.

        Heads with an id or a trace are not kept, because they differ each time. Nor are those of binary
        bodies, which have to be assembled in aligned memory.
        """
        end = len(data) - len(body)
        if (
            end <= MOST_HEAD_BYTES
            and head.content_length == len(body)
            and head.header_length is None
            and head.given_id is None
            and head.trace is None
            and data.find(_END) + 4 == end
            and data.endswith(body)
        ):
            cached = CachedHead(api, head, len(body), caller)
            _keep(self._by_bytes, data[:end], cached)
            length = _LENGTH.search(data, 0, end)
            if length is not None:
                _keep(self._without_length, data[: length.start(1)] + data[length.end(1) : end], cached)

    def clear(self) -> None:
        """Forget every head: the keys in them may no longer be accepted."""
        self._by_bytes.clear()
        self._without_length.clear()

    def _find_other_length(self, head: bytes, size: int) -> CachedHead | None:
        length = _LENGTH.search(head)
        if length is None or int(length[1]) != size:
            return None
        similar = self._without_length.get(head[: length.start(1)] + head[length.end(1) :])
        if similar is None:
            return None
        cached = CachedHead(similar.api, similar.head.with_length(size), size, similar.caller)
        _keep(self._by_bytes, head, cached)
        return cached


def _keep(heads: dict[bytes, CachedHead], key: bytes, cached: CachedHead) -> None:
    if len(heads) >= MOST_HEADS:
        heads.clear()
    heads[key] = cached
