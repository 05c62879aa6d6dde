"""Takes the lists of numbers out of a JSON body; see `_json_numbers.c` for its limits."""

MOST_POWER: int

def scan(
    body: bytes, mark: bytes, most: int = ..., /
) -> tuple[bytes, bytearray, list[tuple[bool, int, int, tuple[int, ...]]]] | None:
    """Return the body with marks for its lists of numbers, the numbers, and the position of each list."""

def count(text: bytes | memoryview, /) -> tuple[int, int, int, int, int, int, int]:
    """Count lists, objects, strings, numbers, literals, the bytes of all characters, and the depth."""

def most_numbers(body: bytes, /) -> int:
    """Return a number that the numbers in lists do not exceed."""

def singles(memory: bytearray, start: int, count: int, real: bool, /) -> bytearray | None:
    """Return `count` numbers of 8 bytes as binary32, or None if one is out of range."""

def has_null(text: bytes, /) -> bool:
    """Return whether `null` is anywhere in `text`."""

def prepare(powers: bytes, /) -> None:
    """Set the powers of five; must be called once, before any `scan`."""
