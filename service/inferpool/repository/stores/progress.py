"""Tells how far a download is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

EVERY_S: Final = 5.0
"""Seconds between two lines about one download."""
TELL_S: Final = 0.25
"""Seconds between two reports to whoever waits."""


class Progress:
    """Counts the bytes that arrive, in any thread, and logs a line every few seconds.

    Attributes:
        fetched: bytes of content that have arrived, those that arrived twice included.
    """

    def __init__(self, name: str, tell: Callable[[int, int], None] | None = None) -> None:
        """`name` is what is fetched, without credentials.

        `tell` is called now and then with the bytes that have arrived, and those that are expected.
        """
        self._name = name
        self._tell = tell
        self._reported = 0.0
        self._lock = threading.Lock()
        self._began = self._told = time.monotonic()
        self._expected = 0
        self.fetched = 0

    def expect(self, size: int) -> None:
        """So many bytes more are to come."""
        with self._lock:
            self._expected += size

    def add(self, size: int) -> None:
        """So many bytes have arrived."""
        with self._lock:
            self.fetched += size
            now = time.monotonic()
            if self._tell is not None and now - self._reported >= TELL_S:
                self._reported = now
                self._tell(self.fetched, self._expected)
            if now - self._told < EVERY_S:
                return
            self._told = now
            line = self._line(now)
        log.info("%s", line)

    def _line(self, now: float) -> str:
        rate = self.fetched / max(now - self._began, 1e-3)
        line = f"{self._name}: {self.fetched / 1e6:.1f} MB fetched, {rate / 1e6:.1f} MB/s"
        if self._expected > self.fetched:
            line += (
                f", {self.fetched / self._expected:.0%}, {(self._expected - self.fetched) / rate:.0f} s left"
            )
        return line
