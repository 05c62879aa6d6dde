"""A cache of parsed request heads, found by their bytes.

A client sends nearly the same head with every request: only the body differs, and with it Content-Length. A
cached head needs no parser. Every entry was read by the parser once. An entry is used only if the same bytes,
apart from the digits of Content-Length, begin the received data, and exactly the announced body follows.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from inferpool.errors import InferpoolError
from inferpool.http.access.caller import Caller
from inferpool.http.predict.api import InferenceApi
from inferpool.http.predict.request_head import RequestHead

MOST_HEADS: Final = 256
"""Heads in each of the tables. A full table is emptied, because most of its heads were sent once."""
MOST_HEAD_BYTES: Final = 1024
"""Longer heads are not kept, to bound the memory of the cache."""

_END: Final = b"\r\n\r\n"
_CREDENTIAL: Final = re.compile(
    rb"\r\n(?:authorization: ?bearer +|x-api-key: ?)([!-~]{1,256})\r\n", re.IGNORECASE
)
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ?([0-9]{1,9})\r\n", re.IGNORECASE)


class CachedHead(NamedTuple):
    """A parsed head, how many bytes of body follow it, and the caller whose key is in the head.

    `caller` is None if the head has no key: the request is then of the caller of its connection.
    """

    api: InferenceApi
    head: RequestHead
    body_bytes: int
    caller: Caller | None


class RefusedHead(NamedTuple):
    """A parsed head with a wrong key or none, how many bytes of body follow it, and why it is refused."""

    api: InferenceApi
    head: RequestHead
    body_bytes: int
    error: InferpoolError


class HeadCache:
    """The heads known to a server; for the event loop alone."""

    __slots__ = (
        "_by_bytes", "_generation", "_last", "_last_bytes", "_last_generation", "_refused",
        "_refused_but_key", "_without_length",
    )  # fmt: skip

    def __init__(self) -> None:
        self._by_bytes: dict[bytes, CachedHead] = {}
        # Keys lack the digits of Content-Length. The parser accepts no head that has this field twice.
        self._without_length: dict[bytes, CachedHead] = {}
        # The head that was found last: often the next request has the same.
        self._last: CachedHead | None = None
        self._last_bytes = b""
        # `clear` is called in any thread, perhaps while `find` is about to keep a head here.
        self._generation = self._last_generation = 0
        # Apart, so that wrong keys, of which there may be any number, take no place of others.
        self._refused: dict[bytes, RefusedHead] = {}
        # Keys of this table lack the key of the client.
        self._refused_but_key: dict[bytes, RefusedHead] = {}

    def find(self, data: bytes) -> tuple[CachedHead, bytes] | None:
        """Return the head and body of `data`, or None unless it is one complete request with a known head."""
        last = self._last
        generation = self._generation
        if last is not None and self._last_generation == generation and data.startswith(self._last_bytes):
            # The head ends there, because an empty line is in it nowhere else.
            end = len(self._last_bytes)
            return (last, data[end:]) if len(data) - end == last.body_bytes else None
        end = data.find(_END) + 4
        if end > MOST_HEAD_BYTES:
            return None
        head = data[:end]
        size = len(data) - end
        cached = self._by_bytes.get(head)
        if cached is None and head not in self._refused:
            cached = self._find_other_length(head, size)
        if cached is None or size != cached.body_bytes:
            return None
        self._last = cached
        self._last_bytes = head
        self._last_generation = generation
        return cached, data[end:]

    def find_refused(self, data: bytes) -> tuple[RefusedHead, bytes | None] | None:
        """Return the head of `data` if it is one complete request like one that was refused, else None.

        The head may have another key than the one that was refused. That key is returned, too; None if it is
        the same.
        """
        if not self._refused:
            return None
        end = data.find(_END) + 4
        if end > MOST_HEAD_BYTES:
            return None
        head = data[:end]
        secret: bytes | None = None
        refused = self._refused.get(head)
        if refused is None:
            key = _CREDENTIAL.search(head)
            if key is None:
                return None
            secret = key[1]
            refused = self._refused_but_key.get(head[: key.start(1)] + head[key.end(1) :])
        return (refused, secret) if refused is not None and len(data) - end == refused.body_bytes else None

    def remember(
        self, data: bytes, body: bytes, api: InferenceApi, head: RequestHead, caller: Caller | None
    ) -> None:
        """Keep the head of the request `data`, which the parser has read as `head` and, in one piece, `body`.

        Heads with an id or a trace are not kept, because they differ each time. Nor are those of binary
        bodies, which have to be assembled in aligned memory.
        """
        end = len(data) - len(body)
        if head.header_length is None and _is_fit(data, body, head):
            cached = CachedHead(api, head, len(body), caller)
            _keep(self._by_bytes, data[:end], cached)
            length = _LENGTH.search(data, 0, end)
            if length is not None:
                _keep(self._without_length, data[: length.start(1)] + data[length.end(1) : end], cached)

    def remember_refused(
        self, data: bytes, body: bytes, api: InferenceApi, head: RequestHead, error: InferpoolError
    ) -> None:
        """Keep the head of a request that is refused with `error` until `clear` is called."""
        if _is_fit(data, body, head):
            if len(self._refused) >= MOST_HEADS:
                self._refused.clear()
                self._refused_but_key.clear()
            end = len(data) - len(body)
            refused = self._refused[data[:end]] = RefusedHead(api, head, len(body), error)
            key = _CREDENTIAL.search(data, 0, end)
            if key is not None:
                self._refused_but_key[data[: key.start(1)] + data[key.end(1) : end]] = refused

    def clear(self) -> None:
        """Forget every head: the keys in them may no longer be accepted."""
        self._generation += 1
        self._by_bytes.clear()
        self._without_length.clear()
        self._refused.clear()
        self._refused_but_key.clear()

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


def _is_fit(data: bytes, body: bytes, head: RequestHead) -> bool:
    """Return whether a head may come again, and whether all of it is before its body in `data`."""
    end = len(data) - len(body)
    return (
        end <= MOST_HEAD_BYTES
        and head.content_length == len(body)
        and head.given_id is None
        and head.trace is None
        and data.find(_END) + 4 == end
        and data.endswith(body)
    )


def _keep(heads: dict[bytes, CachedHead], key: bytes, cached: CachedHead) -> None:
    if len(heads) >= MOST_HEADS:
        heads.clear()
    heads[key] = cached
