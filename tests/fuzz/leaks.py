"""Whether calls leave memory or references behind."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from types import ModuleType

from tests.fuzz.json_cases import MARK, check_singles
from tests.fuzz.json_cases import check_odd_arguments as odd_json
from tests.fuzz.mutations import json_body, mutated
from tests.fuzz.socket_cases import check_odd_arguments as odd_sockets
from tests.fuzz.socket_cases import check_receive, check_send

ALLOWED_BYTES = 32 * 1024
"""Growth that caches of Python's own explain; one lost object in each of the calls is a multiple of it."""


@contextlib.contextmanager
def live_bytes() -> Iterator[Callable[[], int]]:
    """Give a function that counts the bytes allocated now: all of them under ASan, else Python's own."""
    try:
        count = ctypes.CDLL(None).__sanitizer_get_current_allocated_bytes
    except AttributeError:
        tracemalloc.start()
        try:
            yield lambda: (gc.collect(), tracemalloc.get_traced_memory()[0])[1]
        finally:
            tracemalloc.stop()
        return
    count.restype = ctypes.c_size_t
    yield lambda: (gc.collect(), int(count()))[1]


def check_leaks(numbers: ModuleType, sockets: ModuleType, repeats: int) -> None:
    """Run the same calls again and again; raise AssertionError if memory or references grow."""
    chance = random.Random(9)
    bodies = [mutated(json_body(chance), chance) for _ in range(100)] + [json_body(chance) for _ in range(50)]

    def read() -> None:
        for body in bodies:
            numbers.count(body)
            found = numbers.scan(body, MARK, numbers.most_numbers(body))
            if found is not None:
                for real, start, count, _ in found[2]:
                    check_singles(numbers, found[1], start, count, real)
        for seed in range(50):
            odd_json(numbers, random.Random(seed))

    def exchange() -> None:
        for seed in range(5):
            check_receive(sockets, random.Random(seed))
            check_send(sockets, random.Random(seed))
            for more in range(10):
                odd_sockets(sockets, random.Random(10 * seed + more))

    references = [sys.getrefcount(body) for body in bodies], sys.getrefcount(MARK)
    with live_bytes() as count:
        for work in (read, exchange):
            for _ in range(3):
                work()
            before = count()
            for _ in range(repeats):
                work()
            grown = count() - before
            assert grown < ALLOWED_BYTES, f"{work.__name__}: {grown} bytes more after {repeats} repetitions"
    assert references == ([sys.getrefcount(body) for body in bodies], sys.getrefcount(MARK))
