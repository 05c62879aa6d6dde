"""The head of a response: the lines that all responses of one second share, and the response's own."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from inferpool.http.problems import Headers


class ResponsePrefix:
    """Caches the status line and the headers that uvicorn puts on all responses, for each status.

    uvicorn makes a new list of these headers every second, because of the date. A new list empties the cache.
    """

    __slots__ = ("_headers", "_prefixes")

    def __init__(self) -> None:
        self._headers: Headers = []
        self._prefixes: dict[int, bytes] = {}

    def of(self, status: int, headers: Headers) -> bytes:
        """Return the first lines of a response: those of `status` and `headers`; other headers may follow."""
        if headers is not self._headers:
            self._headers = headers
            self._prefixes.clear()
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
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers) or b"\0" in lines:
        lines = b"".join([b"%b: %b\r\n" % header for header in headers if not splits(header)])
    last = b"connection: close\r\n" if closes else b""
    return b"%b%b%bcontent-length: %d\r\n\r\n" % (prefix, lines, last, size)
