"""When an engine bounds its memory, and when it gives freed memory back."""

from __future__ import annotations

from inferpool.engine.engine_memory import LEAST_TRIM_S, SPARE_THREADS, EngineMemory, EngineSystem
from inferpool.system.memory import MemoryUse, stack_bytes

from tests.full_collections import full_collections

MIB = 2**20
LIMIT = 512 * MIB


class FakeMachine:
    """An engine and the other processes of its server; the test sets their memory, in MiB."""

    def __init__(self, held: int, others: int) -> None:
        self.held, self.others, self.freeable, self.kept = held, others, 0, 0
        self.bounds: list[int | None] = []
        self.now = 0.0
        self.idle = True

    def memory(self) -> EngineMemory:
        system = EngineSystem(
            LIMIT,
            lambda: (self.held + self.others) * MIB,
            lambda: MemoryUse(self.held * MIB, (self.held + 30) * MIB),
            self.trim,
            self.limit_data,
            lambda: self.now,
        )
        return EngineMemory(system, lambda: self.idle, self.release)

    def limit_data(self, most_bytes: int | None) -> bool:
        self.bounds.append(most_bytes)
        return True

    def release(self) -> None:
        self.freeable += self.kept
        self.kept = 0

    def trim(self) -> bool:
        self.held -= self.freeable
        self.freeable = 0
        return True


def test_data_is_bounded_by_what_other_processes_leave_at_each_moment() -> None:
    machine = FakeMachine(held=100, others=50)
    memory = machine.memory()
    memory.settle(bound_data=True)
    stacks = SPARE_THREADS * stack_bytes()
    assert machine.bounds == [(LIMIT // MIB - 50 + 30) * MIB + stacks]
    machine.others = 200
    memory.look()
    assert machine.bounds[-1] == (LIMIT // MIB - 200 + 30) * MIB + stacks


def test_data_is_not_bounded_if_a_model_runs_on_a_gpu() -> None:
    machine = FakeMachine(held=100, others=50)
    memory = machine.memory()
    memory.settle(bound_data=False)
    memory.look()
    assert machine.bounds == [None]


def test_no_garbage_is_collected_when_models_have_been_loaded() -> None:
    """All threads would wait for it, and others may serve."""
    with full_collections() as collections:
        FakeMachine(held=100, others=0).memory().settle(bound_data=True)
    assert not collections


def test_memory_is_given_back_once_a_burst_is_over_and_not_all_the_time() -> None:
    machine = FakeMachine(held=100, others=0)
    memory = machine.memory()
    memory.settle(bound_data=True)
    machine.held, machine.freeable, machine.idle = 300, 190, False
    for _ in range(3):
        memory.look()
    assert machine.held == 300, "requests are under way"
    machine.idle = True
    memory.look()
    assert machine.held == 300, "the next request may follow at once"
    memory.look()
    assert machine.held == 110
    machine.held, machine.freeable = 300, 190
    machine.now += LEAST_TRIM_S - 1
    memory.look()
    assert machine.held == 300
    machine.now += 1
    memory.look()
    assert machine.held == 110


def test_what_runtimes_keep_goes_back_too_and_what_stays_is_not_asked_for_again() -> None:
    machine = FakeMachine(held=100, others=0)
    memory = machine.memory()
    memory.settle(bound_data=True)
    machine.held, machine.kept = 300, 180
    for _ in range(2):
        memory.look()
    assert machine.held == 120
    machine.now += LEAST_TRIM_S
    machine.held, machine.kept = 130, 10
    memory.look()
    assert machine.held == 130, "that is not worth a trim"
