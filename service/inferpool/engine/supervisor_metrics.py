"""The supervisor's part of the metrics that all processes share: slots, counters, gauges and beats."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Final

from inferpool.observe.families import CPU_SECONDS
from inferpool.observe.regions import Region, make_regions, read_beat

ENGINE_SLOTS: Final = 64
"""How many engines publish metrics of their own."""


class SupervisorMetrics:
    """Gives each process a slot: the supervisor has the first, then come web processes, engines and gRPC.

    Attributes:
        file: the descriptor of the shared memory.
        grpc_slot: the slot of the process that serves gRPC, if there is one.
    """

    def __init__(self, webs: int) -> None:
        """`webs` is the number of web processes, whose slots are 1 to `webs`."""
        self.grpc_slot = 1 + webs + ENGINE_SLOTS
        self.file = make_regions(self.grpc_slot + 1)
        self._region = Region(self.file, 0)
        self._free = list(range(1 + webs, 1 + webs + ENGINE_SLOTS))
        self._slots: dict[str, int] = {}
        # From the start: a rate misses the first event of a new series.
        self._region.numbers("web_restarts_total", (), 1)

    def slot(self, engine: str) -> int | None:
        """The slot of an engine and of its successors; None if there are too many engines."""
        if engine not in self._slots and self._free:
            self._slots[engine] = self._free.pop(0)
        return self._slots.get(engine)

    def free(self, engine: str) -> None:
        """Let another engine have the slot of one that has no successor. It goes on with its counters."""
        if engine in self._slots:
            self._free.append(self._slots.pop(engine))

    def expect_restarts(self, engine: str) -> None:
        """Show the counter of an engine's restarts, which is 0 at first."""
        self._region.numbers("engine_restarts_total", (engine,), 1)

    def count(self, name: str, *labels: str) -> None:
        """Add 1 to a counter of the supervisor."""
        numbers = self._region.numbers(name, labels, 1)
        if numbers is not None:
            numbers[0] += 1

    def publish(self, now: float, arenas: Iterable[int]) -> None:
        """Publish the gauges and a beat; `arenas` are the descriptors of the memory for tensors."""
        held = 512 * sum(os.fstat(file).st_blocks for file in (self.file, *arenas))
        for name, number in (("shared_memory_bytes", held), (CPU_SECONDS, time.process_time())):
            numbers = self._region.numbers(name, (), 1)
            if numbers is not None:
                numbers[0] = number
        self._region.beat(now)

    def web_beat(self, number: int, pid: int) -> float:
        """The last beat of a web process; 0.0 if it has not beaten yet."""
        return read_beat(self.file, number, pid)

    def expect_grpc(self) -> None:
        """Show the counter of restarts of the process that serves gRPC, which is 0 at first."""
        self._region.numbers("grpc_restarts_total", (), 1)

    def grpc_beat(self, pid: int) -> float:
        """The last beat of the process that serves gRPC; 0.0 if it has not beaten yet."""
        return read_beat(self.file, self.grpc_slot, pid)

    def engine_beat(self, engine: str, pid: int) -> float | None:
        """The last beat of an engine; 0.0 if it has not beaten yet, None if it has no slot."""
        slot = self._slots.get(engine)
        return None if slot is None else read_beat(self.file, slot, pid)
