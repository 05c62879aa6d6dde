"""Bytes to many sockets in one call; see `_volley.c`."""

def send_all(sockets: list[int], bodies: list[bytes]) -> list[int]:
    """Send to each of `sockets` what stands at its place in `bodies`; how many bytes each has taken."""
