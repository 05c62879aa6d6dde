"""Takes the lists of numbers out of a JSON body; see `_json_numbers.c` for its limits."""

MOST_POWER: int

def scan(
    body: bytes, mark: bytes, /
) -> tuple[bytes, bytearray, list[tuple[bool, int, int, tuple[int, ...]]]] | None:
    """Return the body with marks for its lists of numbers, the numbers, and the position of each list."""

def singles(memory: bytearray, start: int, count: int, real: bool, /) -> bytearray | None:
    """Return `count` numbers of 8 bytes as binary32, or None if one is out of range."""

def prepare(powers: bytes, /) -> None:
    """Set the powers of five; must be called once, before any `scan`."""
