"""The instances of a pool: whom an offer wakes, and what happens when a thread dies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest
from inferpool.backends.base import LoadedModel
from inferpool.pool.batch import Batch, Run
from inferpool.pool.instance import Instance
from inferpool.pool.instance_set import MAX_RESTARTS, RESTART_WINDOW_S, InstanceSet
from inferpool.pool.log_limits import LogLimiter
from inferpool.pool.ports import VersionKey

from tests.chaos import inferpool_chaos as chaos


class NoWork:
    """A pool that has no batches; its instances end when `over` is set."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def next_batch(self, instance: Instance) -> Batch | None:
        assert self.over.wait(60)
        return None

    def finish(self, instance: Instance, batch: Batch, run: Run) -> None:
        raise AssertionError("there was no batch")

    def died(self, instance: Instance, batch: Batch | None) -> None:
        raise AssertionError("no thread died")


class Moment:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Moment:
    return Moment()


@pytest.fixture
def instances(clock: Moment) -> Iterator[InstanceSet]:
    """Three instances, which all wait."""
    source = NoWork()
    made = InstanceSet(VersionKey("m", 1), source, clock, LogLimiter(clock))
    for _ in range(3):
        made.start(cast("LoadedModel", chaos.ChaosModel({})), "cpu")
    for instance in made.all():
        made.begin_waiting(instance)
    yield made
    source.over.set()
    for instance in made.all():
        assert instance.join(60)


def test_a_second_instance_is_woken_only_for_rows_that_the_first_cannot_take(instances: InstanceSet) -> None:
    instances.wake_for(1, 4)
    instances.wake_for(4, 4)
    assert instances.idle_count == 2, "one batch takes all rows"
    instances.wake_for(5, 4)
    assert instances.idle_count == 1


def test_an_instance_that_has_arrived_takes_no_more_of_what_waits(instances: InstanceSet) -> None:
    first = instances.all()[-1]
    instances.wake_for(4, 4)
    assert first.woken
    instances.arrived(first)
    assert not first.woken
    instances.wake_for(4, 4)
    assert instances.idle_count == 1


def test_an_instance_that_dies_on_its_way_takes_no_rows(instances: InstanceSet) -> None:
    first = instances.all()[-1]
    instances.wake_for(4, 4)
    instances.remove(first)
    instances.wake_for(4, 4)
    assert instances.idle_count == 1


def test_a_wait_that_times_out_just_as_the_instance_is_woken_goes_on(instances: InstanceSet) -> None:
    first, second = instances.all()[-1], instances.all()[0]
    instances.wake_one()
    assert not instances.stop_waiting(first)
    assert instances.stop_waiting(second)
    assert instances.idle_count == 1


def test_everybody_is_woken_at_the_end(instances: InstanceSet) -> None:
    instances.wake_all()
    assert instances.idle_count == 0
    assert all(instance.wait(0) for instance in instances.all())


def test_deaths_that_are_long_past_do_not_count(instances: InstanceSet, clock: Moment) -> None:
    one = instances.all()[0]
    for _ in range(3):
        for _ in range(MAX_RESTARTS):
            instances.replace(one)
        clock.now += RESTART_WINDOW_S + 1
    assert len(instances) == 3 + 3 * MAX_RESTARTS
    assert {item.state for item in instances.states()} == {"ready"}


def test_an_instance_that_dies_too_often_is_lost(
    instances: InstanceSet, caplog: pytest.LogCaptureFixture
) -> None:
    one = instances.all()[0]
    for _ in range(MAX_RESTARTS + 1):
        instances.replace(one)
    assert len(instances) == 3 + MAX_RESTARTS
    assert [item.state for item in instances.states()].count("lost") == 1
    assert [line.message for line in caplog.records] == [
        "an instance of m/1 died too often and is not replaced"
    ]
