"""Keeps background threads from using up the CPU quota of the process.

The kernel counts the CPU time of a cgroup in periods, usually of 100 ms. A process that has used its quota
stands still until the next period, with every thread in it. One background thread beside the event loop is
enough for that if the quota is one CPU and the machine has two.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from inferpool.system.cgroups import ROOT
from inferpool.system.cpu import affinity_cores, cpu_quota

_SHARE: Final = 0.9
"""The share of the quota that the process may use while background threads run."""
_BURST_S: Final = 0.01
"""CPU time that background threads may use at once after a pause."""
_DEBT_S: Final = 0.1
"""The longest CPU time that a background thread waits for; longer debts come from other threads."""
_SHORTEST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.1
"""The longest pause: background threads go on even if other threads use the whole quota."""
_PAUSE_S: Final = 20e-6
"""A shorter pause, or none, would take the GIL back before the event loop has woken."""
NICE: Final = 5
"""What is added to the nice value of background threads.

The kernel gives such a thread a third of the time of another one. With much less, a background thread that
holds the GIL while models run would keep the event loop waiting.
"""


class CpuPace:
    """Pauses background threads while the process uses more CPU time than its quota allows."""

    def __init__(
        self,
        quota: float | None,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`quota` is in cores; None means that there is none, so that no thread has to pause.

        `cpu_clock` tells the CPU time of all threads of the process, in seconds.
        """
        self._rate = None if quota is None else _SHARE * quota
        self._clock, self._cpu_clock, self._sleep = clock, cpu_clock, sleep
        self._lock = threading.Lock()
        self._credit_s = 0.0
        self._looked, self._used = clock(), cpu_clock()

    def step(self, longest_s: float = _LONGEST_PAUSE_S) -> None:
        """Pause if needed, for `longest_s` seconds or little more.

        Background threads call this between pieces of work of a few milliseconds.
        """
        rate = self._rate
        if rate is None:
            return
        paused_s = 0.0
        while paused_s < longest_s and (debt_s := self._debt()) > 0:
            pause_s = min(max(debt_s / rate, _SHORTEST_PAUSE_S), longest_s)
            self._sleep(pause_s)
            paused_s += pause_s

    def _debt(self) -> float:
        """Return the CPU time, in seconds, that the process has used beyond its quota."""
        with self._lock:
            now, used = self._clock(), self._cpu_clock()
            earned = (now - self._looked) * (self._rate or 0.0)
            credit = self._credit_s + earned - (used - self._used)
            self._credit_s = min(_BURST_S, max(-_DEBT_S, credit))
            self._looked, self._used = now, used
            return -self._credit_s


def quota_to_keep(root: Path = ROOT) -> float | None:
    """Return the CPU quota of this process in cores; None if all its cores together cannot exceed one."""
    quota = cpu_quota(root)
    return None if quota is None or quota >= affinity_cores() else quota


PACE: Final = CpuPace(quota_to_keep())
"""The pace of this process. A quota is that of the whole process, so all its background threads share one."""


def let_others_run(longest_s: float = _LONGEST_PAUSE_S) -> None:
    """Release the GIL, and keep to the pace: background threads call this between pieces of work.

    The pause is one of `longest_s` seconds, or little more.
    """
    PACE.step(longest_s)
    time.sleep(_PAUSE_S)


def yield_to_others() -> None:
    """Give the calling thread a lower priority than the other threads of the process have.

    Only Linux has priorities of threads; elsewhere this does nothing.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICE))
