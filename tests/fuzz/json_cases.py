"""Checks of `_json_numbers`: every value that it reads is the same, bit for bit, as orjson reads it."""

from __future__ import annotations

import contextlib
import random
from types import ModuleType
from typing import Any

import numpy as np
import orjson

from tests.fuzz.mutations import json_body, mutated

MARK = b"0123456789abcdef"

FoundList = tuple[bool, int, int, tuple[int, ...]]


def check_json(module: ModuleType, chance: random.Random) -> bool:
    """Read one random body; return whether the module took it. Raises AssertionError if orjson disagrees."""
    body = json_body(chance)
    if chance.random() < 0.5:
        body = mutated(body, chance)
    found = module.scan(body, MARK)
    if found is None:
        return False
    rest, memory, lists = found
    expected, actual = parsed(body), parsed(rest)
    if expected is None or actual is None:
        assert expected is None, f"orjson reads a body whose remainder it refuses: {body!r}"
        assert actual is None, f"orjson refuses a body whose remainder it reads: {body!r}"
    else:
        compare(expected[0], actual[0], memory, lists, body)
    for real, start, count, _ in lists:
        check_singles(module, memory, start, count, real)
    return True


def check_count(module: ModuleType, chance: random.Random) -> None:
    """Count the values of one random body: as many as orjson makes, or more if a key comes twice."""
    body = json_body(chance)
    if chance.random() < 0.5:
        body = mutated(body, chance)
    counts = module.count(chance.choice((body, memoryview(body), bytearray(body))))
    assert module.most_numbers(body) <= len(body)
    value = parsed(body)
    if value is None:
        return
    made = {list: 0, dict: 0, str: 0, int: 0, None: 0}
    text_bytes, depth = totals(value[0], made, 0)
    expected = (made[list], made[dict], made[str], made[int], made[None], text_bytes, depth)
    assert all(count >= least for count, least in zip(counts, expected, strict=True)), body
    written = module.count(orjson.dumps(value[0]))
    assert written[:5] == expected[:5], body
    assert written[6] == depth, body
    found = module.scan(body, MARK, module.most_numbers(body))
    assert (found is None) == (module.scan(body, MARK) is None), body


def totals(value: Any, made: dict[Any, int], depth: int) -> tuple[int, int]:
    """Add the values of a JSON document to `made`; returns the bytes of its characters, and its depth."""
    kind = type(value)
    made[None if value is None or kind is bool else int if kind is float else kind] += 1
    if kind is str:
        width = 1 if max(value, default="") < "\u0100" else 2 if max(value) < "\U00010000" else 4
        return len(value) * width, depth
    inner: list[Any] = []
    if kind is dict:
        inner = [*value, *value.values()]
    elif kind is list:
        inner = value
    found = [totals(each, made, depth + (kind in (dict, list))) for each in inner]
    deepest = max((deep for _, deep in found), default=depth + (kind in (dict, list)))
    return sum(size for size, _ in found), deepest


def parsed(body: bytes) -> tuple[Any] | None:
    """Return what orjson reads, in a tuple because it may be None; None if `body` is not JSON."""
    try:
        return (orjson.loads(body),)
    except orjson.JSONDecodeError:
        return None


def compare(expected: Any, actual: Any, memory: bytearray, lists: list[FoundList], body: bytes) -> None:
    """Compare the values of a body with those of its remainder, in which marks stand for lists."""
    if isinstance(actual, list) and len(actual) == 1 and isinstance(actual[0], str):
        text = actual[0].encode(errors="surrogatepass")
        if text.startswith(MARK) and expected != actual:
            real, start, count, shape = lists[int(text[len(MARK) :])]
            numbers = np.frombuffer(memory, np.float64 if real else np.int64, count, start)
            plain = np.array(expected, np.float64 if real else np.int64)
            assert plain.shape == shape, body
            assert plain.tobytes() == numbers.tobytes(), body
            return
    assert type(expected) is type(actual), body
    if isinstance(expected, dict):
        assert list(expected) == list(actual), body
        for key, value in expected.items():
            compare(value, actual[key], memory, lists, body)
    elif isinstance(expected, list):
        assert len(expected) == len(actual), body
        for value, other in zip(expected, actual, strict=True):
            compare(value, other, memory, lists, body)
    else:
        assert expected == actual, body


def check_singles(module: ModuleType, memory: bytearray, start: int, count: int, real: bool) -> None:
    """Compare the conversion to binary32 with numpy's."""
    wide = np.frombuffer(memory, np.float64 if real else np.int64, count, start)
    with np.errstate(over="ignore", under="ignore"):
        expected = wide.astype(np.float64).astype(np.float32)
    found = module.singles(memory, start, count, real)
    if found is None:
        assert not np.isfinite(expected).all()
    else:
        assert bytes(found) == expected.tobytes()


def check_odd_arguments(module: ModuleType, chance: random.Random) -> None:
    """Call each function with arguments that it must refuse, or at the limit of what it takes."""
    odd: list[object] = [
        None, True, -1, 0, 1, 7, 8, 2**31, 2**63 - 1, 2**63, -(2**63), 1.5, "x", b"", b"[1]", b'{"a":[1]}',
        bytearray(), bytearray(8), bytearray(20), [], (), bytes(16 * 257),
    ]  # fmt: skip
    name = chance.choice(("scan", "scan", "scan", "singles", "singles", "singles", "count", "most_numbers"))
    count = chance.choice((0, 1, 2, 2, 3, 4, 4, 4, 5))
    arguments = [chance.choice(odd) for _ in range(count)]
    if name == "singles" and count == 4:
        arguments[0] = bytearray(chance.randrange(40))
    if name == "scan" and count == 3:
        arguments = [
            chance.choice((b"[1,2,3]", b'{"a":[1]}')),
            MARK,
            chance.choice((0, 1, 2, 2**40, -1, 2**70)),
        ]
    with contextlib.suppress(TypeError, ValueError, OverflowError, BufferError):
        getattr(module, name)(*arguments)
    for wrong in (b"", bytes(8), "x"):
        try:
            module.prepare(wrong)
        except (TypeError, ValueError):
            continue
        raise AssertionError(f"prepare takes {wrong!r}")
