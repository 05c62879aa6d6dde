"""Keeps the server below its memory limit: derives the bytes that requests may hold, and trims the heap.

The kernel ends a process that exceeds its cgroup's limit. So the bytes that all requests may hold together
follow from that limit, less what the process holds without requests. Three things keep the sum below it:

- `ByteBudget` refuses requests beyond these bytes.
- Freed memory goes back to the kernel after a burst, because glibc keeps it otherwise.
- A limit on the data of the process (RLIMIT_DATA) makes allocations fail that no budget has counted. They
  fail one request with `MemoryError`, and the server goes on.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from inferpool.http.predict.budget import ByteBudget
from inferpool.http.predict.response_cache import ResponseCache
from inferpool.observe.metrics import Metrics, Sample
from inferpool.repository.catalog import Catalog
from inferpool.system.memory import (
    COPIES,
    LEAST_IN_FLIGHT_BYTES,
    LEAST_MARGIN_BYTES,
    MemoryLimit,
    MemoryUse,
    chosen_limit,
    in_flight_bytes,
    limit_data,
    memory_use,
    release_freed_memory,
    stack_bytes,
)

log = logging.getLogger(__name__)

MIB: Final = 2**20
HEAP_SHARE: Final = 32
"""Bodies that are announced and not received take a part of the heap: this share of the limit, divided by the
requests in flight. With 1,000 requests that is a quarter of the limit in total."""
LEAST_TRIM_S: Final = 20.0
"""Pause after a trim; it doubles with each trim that gives back little, up to `MOST_TRIM_S`.

A trim takes 0.12 ms for each MiB that it gives back, and the event loop may have to wait that long for the
heap: 60 ms after a burst of 500 MiB.
"""
SHORT_TRIM_S: Final = 5.0
"""Pause after a trim while more than three quarters of the memory are taken."""
MOST_TRIM_S: Final = 600.0
_QUIET_BYTES: Final = 8 * MIB
"""Requests that hold more are part of a burst, or of the next one, whatever the limit is."""
_SPARE_THREADS: Final = 8
"""Threads whose stacks the data limit leaves room for until the next look."""


class System(NamedTuple):
    """The calls that the monitor makes; tests give others."""

    limit: MemoryLimit
    held: Callable[[], int]
    use: Callable[[], MemoryUse] = memory_use
    trim: Callable[[], bool] = release_freed_memory
    limit_data: Callable[[int | None], bool] = limit_data
    clock: Callable[[], float] = time.monotonic


class CachedMemory:
    """The memory of the response cache."""

    def __init__(self, cache: ResponseCache, catalog: Catalog) -> None:
        """`cache` is used if a model of `catalog` enables it."""
        self._cache = cache
        self._catalog = catalog

    def used(self) -> int:
        """Return the bytes that cached outputs take now."""
        return self._cache.used

    def reserved(self) -> int:
        """Return the bytes that they may take; 0 if no model is cached."""
        models = self._catalog.models().values()
        cached = any(view.cache_digest for model in models for view in model.versions.values())
        return self._cache.limit if cached else 0

    def readings(self) -> list[Sample]:
        """Return the gauges of the cache, and let it forget what is not served any more."""
        self._cache.keep_only(self._catalog.models())
        return self._cache.readings()


def this_system(memory_bytes: int) -> System:
    """The calls for this process, whose limit is `memory_bytes`; 0 takes the cgroup's or the machine's."""
    limit = chosen_limit(memory_bytes)
    return System(limit, limit.held)


class MemoryMonitor:
    """The memory of the process, which has to be looked at about once a second.

    A look gives freed memory back once a burst is over. It then measures what the process holds without
    requests, and sets the budget accordingly.
    """

    def __init__(
        self,
        system: System,
        budget: ByteBudget,
        metrics: Metrics,
        *,
        derive: bool,
        share: int = 1,
        copies: int = COPIES,
        cache: CachedMemory | None = None,
    ) -> None:
        """`derive` sets the limit of `budget`; otherwise only the memory of a request alone is bounded.

        `share` is the number of processes that share the memory for requests, each byte of which takes
        `copies` bytes. `cache` counts as memory beside
        that of requests.
        """
        self._share = share
        self._copies = copies
        self._cache = cache
        self._system = system
        self._budget = budget
        self._derive = derive
        self._bounds_data = False
        self._data_bytes = 0
        self._threads = 0
        self._base = self._held()
        self._quiet = 0
        self._trimmed_at = -math.inf
        self._pause_s = LEAST_TRIM_S
        self._trims = metrics.value("memory_trims_total")
        self._trim_s = metrics.value("memory_trim_seconds_total")
        self._trimmed = metrics.value("memory_trimmed_bytes_total")
        self._working = threading.Lock()
        metrics.add_source(self._readings)
        if cache is not None:
            metrics.add_source(cache.readings)
        self._set_budget()

    def close(self) -> None:
        """Allow all allocations again."""
        if self._bounds_data:
            self._system.limit_data(None)

    def settle(self, *, bound_data: bool) -> None:
        """Take note that models have been loaded: trim, derive the budget anew, and bound the data.

        Garbage is not collected here, because requests would wait. The remains of a burst count as held until
        the next collection.
        `bound_data` is False if a model runs on a GPU: CUDA maps more writable memory than it uses.
        """
        with self._working:
            self._trim(collect=False)
            self._trimmed_at = -math.inf  # the first burst need not wait
            use = self._system.use()
            self._bounds_data = bound_data and use.data > 0
            if self._bounds_data:
                others = max(0, self._system.held() - use.held)
                # Memory that is mapped and was never touched: mostly stacks. Trimmed memory stays mapped, so
                # this is not measured again after a burst.
                untouched = use.data - use.held
                self._data_bytes = self._system.limit.limit - others + untouched
                self._threads = threading.active_count()
            self._set_data_limit()
        limit, budget = self._system.limit.limit, self._budget
        log.info(
            "memory: %d MiB of %d MiB are held without requests; requests may hold %d MiB",
            self._base // MIB, limit // MIB, budget.limit // MIB,
        )  # fmt: skip
        if budget.limit <= LEAST_IN_FLIGHT_BYTES and self._derive:
            log.warning(
                "memory: the models leave no room for requests of more than %d MiB; give the server more than"
                " %d MiB, or serve fewer models",
                budget.limit // MIB, limit // MIB,
            )  # fmt: skip

    def look(self) -> None:
        """Trim if a burst is over or memory is short, and has been freed."""
        with self._working:
            system, used = self._system, self._budget.held
            limit = system.limit.limit
            held = self._held()
            if self._is_quiet(used) and held < self._base:
                # The last trim met requests that held more than they had reserved.
                self._base = held
                self._set_budget()
            excess = held - self._base - used
            self._quiet = self._quiet + 1 if self._is_quiet(used) else 0
            self._set_data_limit()
            short = held > limit - limit // 4
            pause_s = min(self._pause_s, SHORT_TRIM_S) if short else self._pause_s
            if excess < max(LEAST_MARGIN_BYTES // 2, 0 if self._quiet else limit // 16):
                return
            if (self._quiet >= 2 or short) and system.clock() >= self._trimmed_at + pause_s:
                freed = self._trim()
                if freed >= excess // 4:
                    self._pause_s = LEAST_TRIM_S
                elif self._quiet:  # what requests hold meanwhile says nothing of the next trim
                    self._pause_s = min(MOST_TRIM_S, 2 * self._pause_s)

    def _trim(self, *, collect: bool = True) -> int:
        """Give freed memory back and derive the budget anew; returns the bytes given back."""
        system = self._system
        before, began = self._held(), system.clock()
        if collect:
            gc.collect()  # errors and their frames may refer to one another, and keep a body
        system.trim()
        self._trimmed_at = system.clock()
        after, used = self._held(), self._budget.held
        freed = max(0, before - after)
        self._trims.add()
        self._trim_s.add(self._trimmed_at - began)
        self._trimmed.add(freed)
        if self._is_quiet(used):
            # Only then does the process hold what it has: requests reserve memory before they touch it.
            self._base = after
            self._set_budget()
        return freed

    def _is_quiet(self, used: int) -> bool:
        """Whether requests that hold `used` bytes hold next to nothing."""
        return used <= min(_QUIET_BYTES, self._system.limit.limit // 64)

    def _held(self) -> int:
        """Return what the process holds, without the response cache."""
        held = self._system.use().held
        return held if self._cache is None else max(0, held - self._cache.used())

    def _set_budget(self) -> None:
        budget, limit = self._budget, self._system.limit.limit
        held = self._system.held()
        if self._cache is not None:
            # All that may be cached, in every process, is reserved from the beginning.
            held += self._share * max(0, self._cache.reserved() - self._cache.used())
        room = max(LEAST_IN_FLIGHT_BYTES, in_flight_bytes(limit, held, self._copies) // self._share)
        if self._derive:
            budget.limit = room
            budget.most = budget.shared
        else:
            budget.most = max(budget.limit, room)
        budget.heap_bytes = limit // HEAP_SHARE

    def _set_data_limit(self) -> None:
        if self._bounds_data:
            # Each thread that has started since maps a stack, which it hardly touches.
            more = max(0, threading.active_count() - self._threads) + _SPARE_THREADS
            self._system.limit_data(self._data_bytes + more * stack_bytes())

    def _readings(self) -> list[Sample]:
        budget = self._budget
        return [
            ("memory_limit_bytes", (), float(self._system.limit.limit)),
            ("memory_held_bytes", (), float(self._system.held())),
            ("in_flight_bytes", (), float(budget.held)),
            ("in_flight_limit_bytes", (), float(budget.limit)),
        ]
