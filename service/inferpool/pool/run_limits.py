"""When a run is stopped, and when a run that does not stop counts as hung.

Pure policy: moments and lengths in seconds of the pool's clock, no thread, no lock.
"""

from __future__ import annotations

import math
from typing import Final

GO_ON: Final = 0
STOP: Final = 1
HUNG: Final = 2
PART: Final = 3
"""Stop the run, and run each of its entries alone: one of them may hold up all others."""

GRACE_S: Final = 5.0
"""A run may take so long to end after it was asked to stop."""
PATIENCE: Final = 10.0
"""A run that takes so many times what was expected is out of the ordinary.

A batch of several entries is then parted. A run for which nobody waits does not count as hung before.
Some runtimes cannot stop a run. A client that gives up on a slow model must not make its instance look hung.
"""
FIRST_REPEAT_S: Final = 0.02
"""A run is asked to stop again after so long, because it may have been between two calls of the runtime."""
REPEAT_SHARE: Final = 0.25
"""Later repeats wait for this share of the time since the first."""


class RunLimits:
    """How long runs may take.

    Attributes:
        run_timeout_s: seconds that a batch may run; infinity without a limit.
    """

    __slots__ = ("run_timeout_s",)

    def __init__(self, run_timeout_s: float) -> None:
        """With a `run_timeout_s` of 0 there is no limit."""
        self.run_timeout_s = run_timeout_s or math.inf

    def judge(
        self,
        now: float,
        began: float,
        expected_s: float,
        stop_asked: float,
        nobody_waits: bool,
        *,
        parts: bool = False,
    ) -> tuple[int, float]:
        """Return what to do with a run (`GO_ON`, `STOP`, `PART` or `HUNG`), and when to ask again.

        A run that cannot be stopped to be parted goes on until its time is up.

        Args:
            now: this moment.
            began: when the batch began to run.
            expected_s: how long it was expected to run.
            stop_asked: when the run was first asked to stop; infinity if it was not.
            nobody_waits: whether every entry of the batch has its result.
            parts: whether other entries could run first if this run were stopped: those of the same batch, or
                those that were in one with its entry.
        """
        timeout_at = began + self.run_timeout_s
        if stop_asked == math.inf:
            if now >= timeout_at:
                return STOP, now
            if timeout_at == math.inf:
                return GO_ON, math.inf
            part_at = began + max(GRACE_S, PATIENCE * expected_s) if parts else timeout_at
            if now >= part_at:
                return PART, now
            # Batches that begin later are not to wait for this one's time.
            return GO_ON, min(timeout_at, part_at, now + GRACE_S)
        hung_at = max(stop_asked, timeout_at) + GRACE_S
        if nobody_waits:
            hung_at = min(hung_at, max(stop_asked + GRACE_S, began + PATIENCE * expected_s))
        if now >= hung_at:
            return HUNG, math.inf
        return STOP, min(hung_at, now + max(FIRST_REPEAT_S, REPEAT_SHARE * (now - stop_asked)))
