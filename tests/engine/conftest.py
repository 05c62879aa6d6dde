"""Both ends of a channel, which are closed after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.channel_ends import OPEN, Engine, Web


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    """Close what a test has made."""
    yield
    for each in reversed(OPEN.copy()):
        each.close()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def web(engine: Engine) -> Web:
    made = Web()
    made.attach(engine)
    return made
