"""One thread for all that a process does once a second: an idle process wakes up once for everything."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

PAUSE_S: Final = 1.0
LATER_S: Final = 0.004
"""How much later than the event loop the thread comes, to find the interpreter's lock free."""


def until_next(now: float) -> float:
    """Seconds until a whole second of the machine's monotonic clock, at which `now` is.

    All processes then wake up at the same moments, so that an idle machine wakes up once for all of them. A
    timer that was a little early has had its second.
    """
    left = PAUSE_S - now % PAUSE_S
    return left if left > PAUSE_S / 2 else left + PAUSE_S


class EverySecond:
    """Calls functions one after the other, rests until the next second, and calls them again.

    An error of one is logged, and does not keep the others from being called.
    """

    def __init__(self, works: dict[str, Callable[[], object]]) -> None:
        """`works` are the functions, by what the log says has failed if one raises."""
        self._works = works
        # Held while the thread is wanted: waiting for it costs an idle process less than an event would.
        self._open = threading.Lock()
        self._open.acquire()
        self._worker = threading.Thread(target=self._run, name="every-second", daemon=True)

    def start(self) -> None:
        """Start the thread, whose first calls come after a pause. It ends with the process at the latest."""
        self._worker.start()

    def close(self) -> None:
        """End the thread: no function is called after this. It may be called once."""
        self._open.release()
        if self._worker.is_alive():
            self._worker.join()

    def _run(self) -> None:
        while not self._open.acquire(timeout=until_next(time.monotonic() - LATER_S)):
            for what, work in self._works.items():
                try:
                    work()
                except Exception:
                    log.exception("%s failed", what)
