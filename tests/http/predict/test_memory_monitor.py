"""The memory for requests follows from the memory there is; freed memory goes back after a burst."""

from __future__ import annotations

from itertools import pairwise

import pytest
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.budget import ByteBudget
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.memory_monitor import (
    LEAST_TRIM_S,
    MIB,
    MOST_TRIM_S,
    MemoryMonitor,
    System,
    this_system,
)
from inferpool.http.predict.request_head import RequestHead
from inferpool.observe.metrics import Metrics
from inferpool.system.memory import (
    COPIES_APART,
    LEAST_IN_FLIGHT_BYTES,
    MOST_IN_FLIGHT_BYTES,
    MemoryLimit,
    MemoryUse,
    in_flight_bytes,
)

from tests.full_collections import full_collections


class FakeMachine:
    """A process whose memory the test sets, in MiB."""

    def __init__(self, limit: int, held: int) -> None:
        self.held, self.freed, self.stuck = held, 0, 0
        self.data = held + 100
        self.others = 0
        self.trims = 0
        self.now = 1000.0
        self.bound: int | None = None
        self.system = System(
            MemoryLimit(limit * MIB),
            lambda: (self.held + self.freed + self.others) * MIB,
            lambda: MemoryUse((self.held + self.freed) * MIB, self.data * MIB),
            self.trim,
            self.limit_data,
            lambda: self.now,
        )

    def trim(self) -> bool:
        self.trims += 1
        self.freed = self.stuck
        return True

    def limit_data(self, most_bytes: int | None) -> bool:
        self.bound = most_bytes
        return True


def make_monitor(
    machine: FakeMachine, *, derive: bool = True, limit: int = 1
) -> tuple[MemoryMonitor, ByteBudget]:
    budget = ByteBudget(limit)
    return MemoryMonitor(machine.system, budget, Metrics({}), derive=derive), budget


def look(monitor: MemoryMonitor, machine: FakeMachine, times: int = 2) -> None:
    for _ in range(times):
        machine.now += 1
        monitor.look()


@pytest.mark.parametrize(
    ("limit", "held", "expected"),
    [
        (512 * MIB, 112 * MIB, (512 - 112 - 51.2) / 2),
        (256 * MIB, 64 * MIB, (256 - 64 - 32) / 2),
        (64 * MIB, 60 * MIB, LEAST_IN_FLIGHT_BYTES / MIB),
        (2**50, 0, MOST_IN_FLIGHT_BYTES / MIB),
    ],
)
def test_requests_get_half_of_what_models_and_margin_leave(limit: int, held: int, expected: float) -> None:
    assert in_flight_bytes(limit, held) / MIB == pytest.approx(expected, abs=0.1)


def test_requests_get_a_third_if_bodies_are_received_into_shared_memory_too() -> None:
    machine, budget = FakeMachine(256, 64), ByteBudget(1)
    MemoryMonitor(machine.system, budget, Metrics({}), derive=True, copies=COPIES_APART)
    assert budget.limit / MIB == pytest.approx((256 - 64 - 32) / 3, abs=0.1)


def test_the_budget_follows_from_what_is_held_once_the_models_are_loaded() -> None:
    machine = FakeMachine(512, 50)
    monitor, budget = make_monitor(machine)
    assert budget.limit == in_flight_bytes(512 * MIB, 50 * MIB)
    machine.held, machine.freed = 300, 100
    monitor.settle(bound_data=False)
    assert machine.trims == 1
    assert budget.limit == in_flight_bytes(512 * MIB, 300 * MIB)
    assert budget.most == budget.shared < budget.limit, "a large request leaves room for small ones"
    assert machine.bound is None, "a process with a GPU has no data limit"


def test_what_others_in_the_cgroup_hold_is_not_for_requests() -> None:
    machine = FakeMachine(512, 50)
    machine.others = 200
    monitor, budget = make_monitor(machine)
    monitor.settle(bound_data=True)
    assert budget.limit == in_flight_bytes(512 * MIB, 250 * MIB)
    assert machine.bound is not None
    assert 412 * MIB <= machine.bound <= 412 * MIB + 16 * 64 * MIB, "untouched data, the rest, and stacks"


def test_a_setting_stays_and_a_request_alone_may_take_what_memory_there_is() -> None:
    machine = FakeMachine(512, 50)
    monitor, budget = make_monitor(machine, derive=False, limit=1000)
    monitor.settle(bound_data=False)
    assert (budget.limit, budget.most) == (1000, in_flight_bytes(512 * MIB, 50 * MIB))


def test_no_garbage_is_collected_when_models_have_been_loaded() -> None:
    """All threads would wait for it, and others may serve."""
    machine = FakeMachine(limit=1000, held=100)
    monitor, _ = make_monitor(machine)
    with full_collections() as collections:
        monitor.settle(bound_data=False)
        assert (machine.trims, len(collections)) == (1, 0)
        machine.freed = 400
        look(monitor, machine, 3)
        assert (machine.trims, len(collections)) == (2, 1), "what a burst has left is, once it is over"


def test_memory_is_trimmed_once_the_burst_is_over_and_not_during_it() -> None:
    machine = FakeMachine(1024, 50)
    monitor, budget = make_monitor(machine)
    context = PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)
    budget.reserve(context, 100 * MIB)
    machine.held, machine.freed = 150, 300
    look(monitor, machine, 10)
    assert machine.trims == 0, "requests are in flight"
    budget.release(context)
    machine.held, machine.freed = 50, 400
    look(monitor, machine, 2)
    assert machine.trims == 1
    look(monitor, machine, 30)
    assert machine.trims == 1, "there is nothing to give back"


def test_a_burst_that_is_small_beside_the_limit_is_trimmed_too_and_only_once_it_is_over() -> None:
    machine = FakeMachine(24 * 1024, 70)
    monitor, budget = make_monitor(machine)
    context = PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)
    budget.reserve(context, 50 * MIB)
    machine.held, machine.freed = 120, 70
    look(monitor, machine, 3)
    assert machine.trims == 0
    budget.release(context)
    machine.held, machine.freed = 70, 120
    look(monitor, machine, 2)
    assert (machine.trims, machine.freed) == (1, 0)


def test_memory_is_trimmed_during_a_burst_if_it_is_short() -> None:
    machine = FakeMachine(512, 50)
    monitor, budget = make_monitor(machine)
    context = PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)
    budget.reserve(context, 100 * MIB)
    machine.held, machine.freed = 150, 300
    look(monitor, machine, 1)
    assert machine.trims == 1


def test_memory_that_does_not_go_back_is_asked_for_ever_more_seldom() -> None:
    machine = FakeMachine(8192, 50)
    monitor, _ = make_monitor(machine)
    moments = []
    for _ in range(4000):
        machine.freed += 1
        machine.stuck = machine.freed  # fragments keep all of it
        before = machine.trims
        look(monitor, machine, 1)
        if machine.trims > before:
            moments.append(machine.now)
    pauses = [later - earlier for earlier, later in pairwise(moments)]
    assert min(pauses) >= LEAST_TRIM_S
    assert pauses == sorted(pauses)
    assert MOST_TRIM_S <= max(pauses) <= MOST_TRIM_S + 2
    assert len(pauses) < 15


def test_a_trim_that_met_uncounted_memory_does_not_lower_the_budget_for_good() -> None:
    machine = FakeMachine(512, 50)
    monitor, budget = make_monitor(machine)
    full = budget.limit
    machine.held = 400  # decoding, say
    look(monitor, machine, 1)
    assert machine.trims == 1
    assert budget.limit < full
    machine.held = 50
    look(monitor, machine, 1)
    assert budget.limit == full


def test_a_setting_takes_the_place_of_the_cgroups_limit() -> None:
    assert this_system(300 * MIB).limit == MemoryLimit(300 * MIB)
    assert this_system(0).limit.limit > 300 * MIB
