"""How every answer of a second begins."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.http.problems import Headers


class Preamble:
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
