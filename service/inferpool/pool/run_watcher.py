"""One thread of a process that ends runs which take too long, in all pools.

The thread sleeps until the next moment at which a run may have taken too long. While nothing runs it sleeps
until a batch begins; later batches do not wake it before the first could have timed out.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Final, Protocol

from inferpool.pool.ports import VersionKey
from inferpool.pool.run_limits import RunLimits

log = logging.getLogger(__name__)

_LONGEST_WAIT_S: Final = 3600.0
"""Bounds one wait of the thread, because the system's calls do not take any number of seconds."""


class WatchedPool(Protocol):
    """What the watcher needs of a pool."""

    def check_runs(self) -> float:
        """Stop runs that take too long; returns when to ask again, infinity if nothing runs."""


class RunWatcher:
    """Calls `check_runs` of every pool at the moments that matter.

    Attributes:
        limits: how long runs may take.
        on_hung: called with a version and a sentence when a run of it does not stop. The process is expected
            to end: the pool runs nothing in place of the instance that hangs. If it is None, the pool goes on
            as well as it can.
        is_idle: whether the thread is to be woken when a batch begins.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        run_timeout_s: float,
        on_hung: Callable[[VersionKey, str], None] | None = None,
    ) -> None:
        """`run_timeout_s` is how long a batch may run; 0 sets no limit."""
        self.limits = RunLimits(run_timeout_s)
        self.on_hung = on_hung
        self.is_idle = self.limits.run_timeout_s < math.inf
        self._clock = clock
        self._pools: list[WatchedPool] = []
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._started = False

    def add(self, pool: WatchedPool) -> None:
        """Watch the runs of `pool`."""
        with self._lock:
            self._pools = [*self._pools, pool]

    def remove(self, pool: WatchedPool) -> None:
        """Watch the runs of `pool` no more; does nothing if it was not watched."""
        with self._lock:
            self._pools = [each for each in self._pools if each is not pool]

    def wake(self) -> None:
        """Let the thread look at all pools now. Takes no lock of a pool, so that a pool may call it."""
        self.is_idle = False
        self._event.set()
        if not self._started:
            with self._lock:
                starts, self._started = not self._started, True
            if starts:
                threading.Thread(target=self._watch, name="run-watcher", daemon=True).start()

    def _watch(self) -> None:
        while True:
            moment = self._check()
            if moment == math.inf and self.limits.run_timeout_s < math.inf:
                self.is_idle = True
                moment = self._check()  # a batch may have begun before `is_idle` was set
                self.is_idle = moment == math.inf
            wait_s = moment - self._clock()
            self._event.wait(None if moment == math.inf else min(_LONGEST_WAIT_S, max(0.0, wait_s)))
            self._event.clear()

    def _check(self) -> float:
        moment = math.inf
        for pool in self._pools:
            try:
                moment = min(moment, pool.check_runs())
            except Exception:
                log.exception("the runs of a pool could not be checked")
        return moment
