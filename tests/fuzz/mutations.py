"""Random changes to request bodies, and random JSON bodies of lists of numbers."""

from __future__ import annotations

import random
from collections.abc import Callable

PIECES = [
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\0", b"\xff", b"-", b".", b"e9", b"1e999", b"NaN"),
    *(b"null", b"true", b"[[]]", b'"x":', b"9" * 25, b"\\ud800", b"[" * 40, b"\xff\xff\xff\x7f"),
    *(b"PK\x01\x02", b"0.", b"1e-300", b"0" * 30, b"-0", b"1e+", b"9223372036854775808", b" \n\t\r"),
]
"""Bytes that parsers treat in a special way."""


def mutated(body: bytes, chance: random.Random) -> bytes:
    """Return `body` with one to three cuts, flips, insertions, repetitions or replacements."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(body) + 1)
        end = min(len(body), start + chance.choice((1, 1, 2, 8, 40)))
        kind = chance.randrange(5)
        if kind == 0:
            body = body[:start] + body[end:]
        elif kind == 1:
            body = body[:start] + chance.choice(PIECES) + body[start:]
        elif kind == 2:
            body = body[:start] + chance.choice(PIECES) + body[end:]
        elif kind == 3:
            body = body[:end] + body[start:]
        elif start < len(body):
            body = body[:start] + bytes((body[start] ^ (1 << chance.randrange(8)),)) + body[start + 1 :]
    return body


def number_text(chance: random.Random) -> str:
    """Return a JSON number: short or long, with or without fraction and exponent, often at a limit."""
    sign = chance.choice(("", "", "-"))
    kind = chance.randrange(8)
    if kind == 0:
        return sign + str(chance.choice((0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64)))
    if kind == 1:
        return sign + str(chance.randrange(10 ** chance.randrange(1, 22)))
    if kind == 2:  # just half-way between two floats, or one digit beside it
        return f"{sign}{(2 * chance.randrange(2**52, 2**53) + 1) * 2 ** chance.randrange(10)}.0"
    if kind == 3:
        digits = "".join(chance.choices("0123456789", k=chance.randrange(1, 40)))
        return f"{sign}0.{'0' * chance.randrange(30)}{digits}"
    if kind == 4:
        exponent = chance.choice((0, 1, 22, 23, 37, 38, 39, 127, 128, 129, 308, 309, 99999))
        return f"{sign}{chance.randrange(10**6)}.{chance.randrange(10**6)}e{chance.choice('+-')}{exponent}"
    if kind == 5:
        return repr(chance.choice((-1, 1)) * chance.random() * 10.0 ** chance.randrange(-45, 45))
    return f"{sign}{chance.random()}"


def usual_number_text(chance: random.Random) -> str:
    """Return a JSON number as clients send it."""
    if chance.random() < 0.3:
        return str(chance.randrange(-300, 300))
    return repr(chance.choice((-1, 1)) * chance.random() * 10.0 ** chance.randrange(-5, 6))


def nested_text(
    chance: random.Random, shape: list[int], spaces: str, number: Callable[[random.Random], str]
) -> str:
    """Return nested JSON lists of `shape` with random numbers; a list in twenty is irregular."""
    if not shape:
        return number(chance)
    length = shape[0] if chance.random() > 0.05 / len(shape) else chance.randrange(4)
    inner = f"{spaces},{spaces}".join(nested_text(chance, shape[1:], spaces, number) for _ in range(length))
    return f"[{spaces}{inner}{spaces}]"


def json_body(chance: random.Random) -> bytes:
    """Return a native or v2 body with lists of numbers beside other values; most are valid JSON."""
    lists = []
    number = chance.choice((number_text, usual_number_text, usual_number_text))
    for _ in range(chance.randrange(1, 4)):
        shape = [chance.randrange(1, 5) for _ in range(chance.choice((1, 1, 2, 2, 3, 8, 33)))]
        if len(shape) > 3:
            shape = [1] * (len(shape) - 2) + shape[:2]
        if chance.random() < 0.02:  # beyond the size from which the GIL is released
            shape = [chance.randrange(1000, 4000)]
        lists.append(nested_text(chance, shape, chance.choice(("", "", " ", "\n\t")), number))
    if chance.random() < 0.05:  # as many numbers as a body of its length can have
        lists = [f"[{','.join(['7'] * chance.randrange(1, 3000))}]"]
    if chance.random() < 0.5:
        members = ",".join(f'"{chance.choice("xyz")}":{text}' for text in lists)
        text = f'{{"id":"é\\"[1,2]","inputs":{{{members}}},"outputs":["y"],"parameters":{{"a":[[3,4]]}}}}'
    elif chance.random() < 0.5:
        members = ",".join(f'{{"name":"x","shape":[2,3],"data":{text}}}' for text in lists)
        text = f'{{"inputs":[{members}],"parameters":{{"priority":1}}}}'
    else:
        text = f'{{"inputs":{lists[0]}}}'
    return text.encode()
