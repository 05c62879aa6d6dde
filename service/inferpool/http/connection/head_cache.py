"""Heads of predict requests that have been read before, found again by their bytes.

A client sends the same head over and over: only the body differs, and with it its length. Such a head needs
no parser. What is learned was read by the parser, and is only used where the same bytes, but for the digits
of that length, stand at the front of what came in, with the whole body, and no more, behind them.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from inferpool.http.predict.api import InferenceApi
from inferpool.http.predict.request_head import RequestHead

MOST_HEADS: Final = 256
"""So many are kept, and as many without the digits; then all are forgotten, for most were sent once."""
MOST_HEAD_BYTES: Final = 1024
"""Longer heads are not kept: with as many as there may be, they would take memory."""

_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ?([0-9]{1,9})\r\n", re.IGNORECASE)


class KnownHead(NamedTuple):
    """What a head says, and how many bytes of body follow it."""

    api: InferenceApi
    head: RequestHead
    body_bytes: int


class HeadCache:
    """The heads known to a server; for the event loop alone."""

    def __init__(self) -> None:
        self._known: dict[bytes, KnownHead] = {}
        # The same without the digits of their lengths. There is one such field in a head that a parser takes.
        self._shapes: dict[bytes, KnownHead] = {}

    def find(self, data: bytes) -> tuple[KnownHead, bytes] | None:
        """The head and the body in `data`, if they are one whole request whose head is known."""
        end = data.find(_END) + 4
        if end > MOST_HEAD_BYTES:
            return None
        head = data[:end]
        size = len(data) - end
        known = self._known.get(head) or self._find_shape(head, size)
        return (known, data[end:]) if known is not None and size == known.body_bytes else None

    def learn(self, data: bytes, body: bytes, api: InferenceApi, head: RequestHead) -> None:
        """Keep the head of the request `data`, which the parser took for `head` and, in one piece, `body`.

        Nothing is kept that says more than what is the same each time: an id, or whose trace it is. Nor where
        the body is to be put together in aligned memory.
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
            known = KnownHead(api, head, len(body))
            _keep(self._known, data[:end], known)
            length = _LENGTH.search(data, 0, end)
            if length is not None:
                _keep(self._shapes, data[: length.start(1)] + data[length.end(1) : end], known)

    def _find_shape(self, head: bytes, size: int) -> KnownHead | None:
        length = _LENGTH.search(head)
        if length is None or int(length[1]) != size:
            return None
        alike = self._shapes.get(head[: length.start(1)] + head[length.end(1) :])
        if alike is None:
            return None
        known = KnownHead(alike.api, alike.head.with_length(size), size)
        _keep(self._known, head, known)
        return known


def _keep(heads: dict[bytes, KnownHead], key: bytes, known: KnownHead) -> None:
    if len(heads) >= MOST_HEADS:
        heads.clear()
    heads[key] = known
