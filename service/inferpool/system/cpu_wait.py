"""Measures how long a thread waits for a core that others have, which spoils what it times meanwhile."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from inferpool.system.cgroups import ROOT

_PROBE: Final = bytes(2**20)
_PROBES: Final = 8


class CpuWait:
    """Counts what the calling thread runs and waits from now on. All methods are called in one thread.

    The kernel counts the time that a thread spends ready to run, and that of a quota which is used up. A
    virtual machine also counts the time that its host takes away.
    """

    def __init__(self, root: Path = ROOT) -> None:
        """`root` contains `proc`."""
        self._root = root
        self._began = self._thread()
        self._stolen = self._steal()

    def share(self) -> float:
        """The share of the time, from 0 to 1, in which the thread could not run; 0 if nothing tells that."""
        ran, waited = (after - before for after, before in zip(self._thread(), self._began, strict=True))
        stolen, all_of = (after - before for after, before in zip(self._steal(), self._stolen, strict=True))
        shares = (waited / (ran + waited) if ran + waited else 0.0, stolen / all_of if all_of else 0.0)
        return min(1.0, max(0.0, *shares))

    def _thread(self) -> tuple[int, int]:
        """The nanoseconds that the thread has run and waited, by the kernel's sched-stats.rst."""
        try:
            ran, waited, _ = (self._root / "proc/thread-self/schedstat").read_text().split()
            return int(ran), int(waited)
        except (OSError, ValueError):
            return 0, 0

    def _steal(self) -> tuple[int, int]:
        """The ticks that the host has taken away, and those of all cores in all, by proc_stat(5)."""
        try:
            line = (self._root / "proc/stat").read_text().partition("\n")[0]
            ticks = [int(word) for word in line.split()[1:9]]
            return ticks[7], sum(ticks)
        except (OSError, ValueError, IndexError):
            return 0, 0


def waited_share() -> float:
    """The share of the time that a thread waits for a core at this moment; takes a few ms of CPU time."""
    wait = CpuWait()
    for _ in range(_PROBES):
        hashlib.sha256(_PROBE).digest()  # it runs without the interpreter's lock
    return wait.share()
