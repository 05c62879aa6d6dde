"""Entries find the pool of their version, and no other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from queue import Queue as Results
from typing import cast

import numpy as np
import pytest
from inferpool.backends.base import LoadedModel
from inferpool.errors import NotReady
from inferpool.observe.metrics import Metrics
from inferpool.pool.admission import Limits
from inferpool.pool.latency_model import LatencyModel
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Entry, Result, VersionKey
from inferpool.pool.router import PoolRouter

from tests.chaos import inferpool_chaos as chaos

ONE, TWO = VersionKey("m", 1), VersionKey("m", 2)


class Outbox:
    """Keeps results."""

    def __init__(self) -> None:
        self.results: Results[Result] = Results()

    def ended(self, entry_ids: Sequence[int]) -> None:
        """The inputs are arrays of this process."""

    def put(self, results: Sequence[Result]) -> None:
        for result in results:
            self.results.put(result)


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture
def router(outbox: Outbox) -> Iterator[PoolRouter]:
    """A router with a pool for version 1 that runs, and one for version 2 that has lost its instances."""
    made = PoolRouter()
    for key in (ONE, TWO):
        pool = Pool(
            key, Limits(4, 10, 10**6), LatencyModel(), outbox, Metrics({}), time.monotonic, batched=True
        )
        made.add(pool)
    made.pools()[0].start_instance(cast("LoadedModel", chaos.ChaosModel({})), "cpu")
    yield made
    for pool in made.pools():
        assert pool.drain(60)


def entry(key: VersionKey) -> Entry:
    return Entry(1, key, {"x": np.ones((1, 4), np.float32)}, 1, None, 16, time.monotonic())


def test_an_entry_runs_in_the_pool_of_its_version(router: PoolRouter, outbox: Outbox) -> None:
    router.refuse_early(ONE, 0)
    router.offer(entry(ONE))
    result = outbox.results.get(timeout=60)
    assert (result.entry_id, result.error) == (1, None)
    with pytest.raises(NotReady, match="lost"):
        router.offer(entry(TWO))


def test_a_version_without_a_pool_is_not_ready(router: PoolRouter) -> None:
    router.remove(TWO)
    router.remove(TWO)
    assert [pool.key for pool in router.pools()] == [ONE, TWO]
    router.forget(router.pools()[1])
    assert [pool.key for pool in router.pools()] == [ONE]
    for attempt in (lambda: router.offer(entry(TWO)), lambda: router.refuse_early(TWO, 0)):
        with pytest.raises(NotReady, match='version 2 of "m" is not ready'):
            attempt()


def test_cancelling_is_harmless_whatever_is_left(router: PoolRouter, outbox: Outbox) -> None:
    router.cancel(ONE, 99, "disconnected")
    router.cancel(VersionKey("m", 3), 99, "disconnected")
    assert outbox.results.empty()
