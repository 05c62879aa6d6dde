"""The head of a response: the lines that all responses of one second share, and the response's own.

`_socketio`, a module in C, puts small responses together; without it, Python does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from inferpool.http.predict.api import Data
from inferpool.http.predict.response_cache import CACHE_HEADERS, NOT_CACHED
from inferpool.http.problems import Headers

try:
    from inferpool.http.connection import _socketio
except ImportError:  # not on Linux, or there was no C compiler at installation
    _socketio = None  # type: ignore[assignment]

_LENGTH: Final = b"content-length: "
_LAST: Final = b"connection: close\r\ncontent-length: "
"""The last line of a head without its number; a response may be the last one on its connection."""


class ResponsePrefix:
    """Caches the status line and the headers that many responses share, for each status.

    Those are the headers that uvicorn puts on all responses, and what Cache-Status says of answers.

    uvicorn makes a new list of these headers every second, because of the date. A new list empties the cache.
    """

    __slots__ = ("_answers", "_headers", "_prefixes")

    def __init__(self) -> None:
        self._headers: Headers = []
        self._prefixes: dict[int, bytes] = {}
        self._answers: list[bytes] = [b""] * len(CACHE_HEADERS)

    def of(self, status: int, headers: Headers, cached: int = NOT_CACHED) -> bytes:
        """Return the first lines of a response: those of `status` and `headers`; other headers may follow.

        `cached` is the index of another header of an answer, in `CACHE_HEADERS`.
        """
        if headers is not self._headers:
            self._headers = headers
            self._prefixes.clear()
            self._answers = [b""] * len(CACHE_HEADERS)
        if cached != NOT_CACHED:
            answer = self._answers[cached]
            if not answer:
                answer = self._answers[cached] = (
                    self.of(status, headers) + b"%b: %b\r\n" % CACHE_HEADERS[cached]
                )
            return answer
        prefix = self._prefixes.get(status)
        if prefix is None:
            prefix = STATUS_LINE[status] + b"".join([b"%b: %b\r\n" % header for header in headers])
            self._prefixes[status] = prefix
        return prefix


def splits(header: tuple[bytes, bytes]) -> bool:
    """Return whether a header would end its line, or the head, before its own end."""
    text = b"".join(header)
    return b"\r" in text or b"\n" in text or b"\0" in text


def response_head(prefix: bytes, headers: Headers, closes: bool, size: int) -> bytes:
    """Return a response head: `prefix`, `headers`, and the length of the body in bytes, `size`.

    `closes` says that the response is the last on its connection. A header of more than one line is left out:
    its maker should have checked it, and no client may add lines to a response.
    """
    # `Any` spares unpacking each header into its two halves only to pack them again.
    pairs: list[Any] = headers
    lines = b"".join([b"%b: %b\r\n" % pair for pair in pairs])
    # A number is found in a tenth of the time that bytes are.
    if lines.count(b"\n") != len(pairs) or lines.count(b"\r") != len(pairs) or 0 in lines:
        lines = b"".join([b"%b: %b\r\n" % header for header in headers if not splits(header)])
    return b"".join([prefix, lines, _LAST if closes else _LENGTH, str(size).encode(), b"\r\n\r\n"])


def whole_response(prefix: bytes, headers: Headers, closes: bool, size: int, parts: Sequence[Data]) -> bytes:
    """Return the head that `response_head` returns, with the `parts` of the body behind it."""
    if _socketio is not None and isinstance(parts, list):
        last = _LAST if closes else _LENGTH
        whole = _socketio.join(prefix, headers, last, size, cast("list[bytes]", parts))
        if whole is not None:
            return whole
    return b"".join((response_head(prefix, headers, closes, size), *parts))
