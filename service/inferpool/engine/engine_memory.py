"""The memory of an engine: bounded, so that a run that needs too much fails, and trimmed after bursts."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from inferpool.system.memory import (
    LEAST_MARGIN_BYTES,
    MemoryLimit,
    MemoryUse,
    family_held,
    limit_data,
    memory_use,
    release_freed_memory,
    stack_bytes,
)

LEAST_TRIM_S: Final = 20.0
"""Pause after a trim; it doubles with each trim that gives back little, up to `MOST_TRIM_S`."""
MOST_TRIM_S: Final = 600.0
IDLE_LOOKS: Final = 2
"""A burst is over after this many looks without a request."""
SPARE_THREADS: Final = 8
"""Threads whose stacks the bound leaves room for until the next look."""


class EngineSystem(NamedTuple):
    """The calls to the machine; tests give others.

    Attributes:
        limit: bytes for all processes of the server.
        held: the bytes that all of them hold.
    """

    limit: int
    held: Callable[[], int]
    use: Callable[[], MemoryUse] = memory_use
    trim: Callable[[], bool] = release_freed_memory
    limit_data: Callable[[int | None], bool] = limit_data
    clock: Callable[[], float] = time.monotonic


def engine_system(limit: MemoryLimit) -> EngineSystem:
    """The calls for an engine, whose parent has the other processes of the server as children."""
    return EngineSystem(limit.limit, lambda: max(limit.held(), family_held(os.getppid())))


class EngineMemory:
    """The memory of the engine, which has to be looked at about once a second.

    The kernel ends a process if memory runs out, and each request in it has to run again. An allocation that
    fails costs one request only.
    """

    def __init__(
        self, system: EngineSystem, is_idle: Callable[[], bool], release: Callable[[], None]
    ) -> None:
        """`is_idle` tells whether no request is in the engine.

        `release` makes runtimes free the memory that they keep for later runs.
        """
        self._system = system
        self._is_idle = is_idle
        self._release = release
        self._bounds_data = False
        self._untouched = 0
        self._threads = 0
        self._base = 0
        self._idle_looks = 0
        self._trimmed_at = -math.inf
        self._pause_s = LEAST_TRIM_S
        self._working = threading.Lock()

    def settle(self, *, bound_data: bool) -> None:
        """Take note that models have been loaded.

        No garbage is collected, because requests would wait.
        `bound_data` is False if a model runs on a GPU: CUDA maps more writable memory than it uses.
        """
        with self._working:
            self._system.trim()
            use = self._system.use()
            self._base = use.held
            self._trimmed_at = -math.inf
            # Memory that is mapped and was never touched: mostly stacks. Trimmed memory stays mapped.
            self._untouched = use.data - use.held
            self._threads = threading.active_count()
            self._bounds_data = bound_data and use.data > 0
            if self._bounds_data:
                self._bound(use)
            else:
                self._system.limit_data(None)

    def look(self) -> None:
        """Bound the data anew, because other processes hold more or less, and trim if a burst is over."""
        with self._working:
            system = self._system
            use = system.use()
            if self._bounds_data:
                self._bound(use)
            self._idle_looks = self._idle_looks + 1 if self._is_idle() else 0
            if self._idle_looks < IDLE_LOOKS:
                return
            self._base = min(self._base, use.held)
            excess = use.held - self._base
            if excess < LEAST_MARGIN_BYTES // 2:
                return
            if system.clock() >= self._trimmed_at + self._pause_s:
                gc.collect()
                self._release()
                system.trim()
                self._trimmed_at = system.clock()
                self._base = system.use().held  # the web processes keep some of the memory that is shared
                freed = use.held - self._base
                self._pause_s = LEAST_TRIM_S if freed >= excess // 4 else min(MOST_TRIM_S, 2 * self._pause_s)

    def _bound(self, use: MemoryUse) -> None:
        others = max(0, self._system.held() - use.held)
        # Each thread that has started since maps a stack, which it hardly touches.
        more = max(0, threading.active_count() - self._threads) + SPARE_THREADS
        self._system.limit_data(self._system.limit - others + self._untouched + more * stack_bytes())
