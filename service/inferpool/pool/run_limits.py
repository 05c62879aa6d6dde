"""When a run is stopped, and when a run that does not stop counts as hung.

Pure policy: moments and lengths in seconds of the pool's clock, no thread, no lock.
"""

from __future__ import annotations

import math
from typing import Final

GO_ON: Final = 0
STOP: Final = 1
HUNG: Final = 2

GRACE_S: Final = 5.0
"""A run may take so long to end after it was asked to stop."""
PATIENCE: Final = 10.0
"""A run for which nobody waits does not count as hung before it has taken so many times what was expected.

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
        self, now: float, began: float, expected_s: float, stop_asked: float, nobody_waits: bool
    ) -> tuple[int, float]:
        """Return what to do with a run (`GO_ON`, `STOP` or `HUNG`), and when to ask again.

        Args:
            now: this moment.
            began: when the batch began to run.
            expected_s: how long it was expected to run.
            stop_asked: when the run was first asked to stop; infinity if it was not.
            nobody_waits: whether every entry of the batch has its result.
        """
        timeout_at = began + self.run_timeout_s
        if stop_asked == math.inf:
            return (STOP, now) if now >= timeout_at else (GO_ON, timeout_at)
        hung_at = stop_asked + GRACE_S
        if nobody_waits:
            patient = max(hung_at, began + PATIENCE * expected_s)
            hung_at = min(patient, max(hung_at, timeout_at + GRACE_S))
        if now >= hung_at:
            return HUNG, math.inf
        return STOP, min(hung_at, now + max(FIRST_REPEAT_S, REPEAT_SHARE * (now - stop_asked)))
