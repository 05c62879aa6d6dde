"""Reads from, or writes to, many sockets in one call; see `_socketio.c` for its limits."""

def receive(epoll: int, buffer: bytearray, most: int) -> list[tuple[int, bytes | None]]:
    """Return pairs of a descriptor and at most `most` bytes read from it, None at the end of its stream."""

def send_all(sockets: list[int], bodies: list[bytes]) -> list[int]:
    """Send to each of `sockets` the bytes at the same index of `bodies`; return how many each has taken."""
