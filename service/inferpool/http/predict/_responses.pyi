"""Puts small responses together; see `_responses.c` for its limits."""

from inferpool.http.problems import Headers

def join(prefix: bytes, headers: Headers, last: bytes, size: int, parts: list[bytes], /) -> bytes | None:
    """Return a whole response, or None if the module does not take its headers or parts."""

def server_timing(queue_s: float, compute_s: float, total_s: float, /) -> bytes:
    """Return the value of Server-Timing."""
