"""Finds processes that exist and do nothing, because they are stopped or one thread lets no other one run.

Every process of the server writes the moment of its last beat into shared memory, once a second.
"""

from __future__ import annotations

from typing import Final

START_S: Final = 600.0
"""How long a process may take until its first beat. It imports libraries, on a machine that may be busy."""


class Liveness:
    """Follows the beats of processes.

    The time between two looks counts, but not more than `longest_step_s` of it: if the whole server is
    frozen, as a container can be, nobody has been silent.
    """

    def __init__(self, timeout_s: float, longest_step_s: float) -> None:
        """A process that is silent for more than `timeout_s` seconds counts as dead; 0 sets no limit."""
        self._timeout_s = timeout_s
        self._longest_step_s = longest_step_s
        self._last_look = 0.0
        # By process id: the last beat, and for how many seconds there has been no other.
        self._seen: dict[int, tuple[float, float]] = {}

    def look(self, now: float, beats: dict[int, float]) -> dict[int, float]:
        """The processes that have been silent for too long, with the seconds.

        `beats` has the last beat of each process by its id, 0.0 before the first. A process that must not be
        judged now is left out; its silence begins anew.
        """
        step_s = min(self._longest_step_s, now - self._last_look)
        self._last_look = now
        seen: dict[int, tuple[float, float]] = {}
        for pid, beat in beats.items():
            last, silent_s = self._seen.get(pid, (beat, -step_s))
            seen[pid] = (beat, silent_s + step_s if beat == last else 0.0)
        self._seen = seen
        if not self._timeout_s:
            return {}
        return {
            pid: silent_s
            for pid, (beat, silent_s) in seen.items()
            if silent_s > (self._timeout_s if beat else max(START_S, self._timeout_s))
        }
