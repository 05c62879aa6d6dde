"""The lines at the head of an answer: those that all answers of a second share, and its own."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from inferpool.http.problems import Headers

_LONGEST_S = 3600.0
"""What took longer is shown as this."""


class ResponsePrefix:
    """The status line, and the headers that uvicorn puts on all answers, put together once for each status.

    uvicorn makes the list of these headers anew each second, for the date: a new list ends what was kept.
    """

    def __init__(self) -> None:
        self._headers: Headers = []
        self._lines: dict[int, bytes] = {}

    def of(self, status: int, headers: Headers) -> bytes:
        """The first lines of an answer with `status`, which has these `headers`, and others behind them."""
        if headers is not self._headers:
            self._headers = headers
            self._lines.clear()
        lines = self._lines.get(status)
        if lines is None:
            lines = STATUS_LINE[status] + b"".join(name + b": " + value + b"\r\n" for name, value in headers)
            self._lines[status] = lines
        return lines


def response_head(opening: bytes, headers: Headers, closes: bool, size: int) -> bytes:
    """The head of an answer: `opening`, its own headers, and how long its body is, `size` bytes.

    `closes` says that it is the last on its connection.
    """
    lines = [opening, *(name + b": " + value + b"\r\n" for name, value in headers)]
    if closes:
        lines.append(b"connection: close\r\n")
    lines.append(b"content-length: %d\r\n\r\n" % size)
    return b"".join(lines)


def server_timing(queue_s: float, compute_s: float, total_s: float) -> bytes:
    """The value of Server-Timing (W3C Server Timing), in milliseconds down to a thousandth."""
    queue, compute, total = _milliseconds(queue_s), _milliseconds(compute_s), _milliseconds(total_s)
    return b"queue;dur=%d.%03d, compute;dur=%d.%03d, total;dur=%d.%03d" % (*queue, *compute, *total)


def _milliseconds(seconds: float) -> tuple[int, int]:
    return divmod(round(1e6 * min(max(seconds, 0.0), _LONGEST_S)), 1000)
