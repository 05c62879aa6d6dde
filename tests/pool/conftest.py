"""What the tests of the pool share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.pool.bench import Bench


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**fields: Any) -> Bench:
        made.append(Bench(**fields))
        return made[-1]

    yield make
    for item in made:
        item.go()
        item.pool.drain(60)
