"""The lines at the head of an answer; see `_lines.c`."""

def head(opening: bytes, headers: list[tuple[bytes, bytes]], closes: bool, size: int) -> bytes:
    """The head of an answer whose body has `size` bytes."""

def timing(queue_s: float, compute_s: float, total_s: float) -> bytes:
    """The value of Server-Timing, for these seconds."""
