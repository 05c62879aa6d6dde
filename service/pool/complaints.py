"""Log lines that others can cause at will: of each kind one a minute, which says how many went unsaid."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

EVERY_S: Final = 60.0
"""Seconds between two lines of one kind."""


class Complaints:
    """Decides which lines are written; safe to share between threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives moments in seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def unsaid(self, kind: str) -> int | None:
        """How many of `kind` went unsaid since the last that was said; None where this one is to as well.

        There must be but few kinds, and none that a client can make up.
        """
        with self._lock:
            now = self._clock()
            said = self._said.get(kind)
            if said is not None and now < said + EVERY_S:
                self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
                return None
            self._said[kind] = now
            return self._unsaid.pop(kind, 0)
