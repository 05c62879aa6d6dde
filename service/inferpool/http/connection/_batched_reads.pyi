"""What has come on many sockets, in one call; see `_muster.c`."""

def receive(epoll: int, room: bytearray, most: int) -> list[tuple[int, bytes | None]]:
    """Pairs of a descriptor and what has come there, None at the end of it."""
