"""Limits log lines that clients can cause at will to one a minute of each kind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

EVERY_S: Final = 60.0
"""Seconds between two lines of one kind."""


class LogLimiter:
    """Decides which lines are written. Threads may share a limiter."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns moments in seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._written_at: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def suppressed(self, kind: str) -> int | None:
        """Return how many lines of `kind` were suppressed since the last one; None to suppress this one too.

        There must be few kinds, and clients must not be able to make up new ones.
        """
        with self._lock:
            now = self._clock()
            written_at = self._written_at.get(kind)
            if written_at is not None and now < written_at + EVERY_S:
                self._suppressed[kind] = self._suppressed.get(kind, 0) + 1
                return None
            self._written_at[kind] = now
            return self._suppressed.pop(kind, 0)
