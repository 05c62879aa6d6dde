"""Many sockets in one call, and responses put together; see `_socketio.c` for its limits."""

from inferpool.http.problems import Headers

def join(prefix: bytes, headers: Headers, last: bytes, size: int, parts: list[bytes], /) -> bytes | None:
    """Return a whole response, or None if the module does not take its headers or parts."""

def receive(epoll: int, buffer: bytearray, most: int) -> list[tuple[int, bytes | None]]:
    """Return pairs of a descriptor and at most `most` bytes read from it, None at the end of its stream."""

def send_all(sockets: list[int], bodies: list[bytes]) -> list[int]:
    """Send to each of `sockets` the bytes at the same index of `bodies`; return how many each has taken."""
