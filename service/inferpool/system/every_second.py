"""One thread for all that a process does once a second: an idle process wakes up once for everything."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

PAUSE_S: Final = 1.0


class EverySecond:
    """Calls functions one after the other, rests for `PAUSE_S` seconds, and calls them again.

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
        while not self._open.acquire(timeout=PAUSE_S):
            for what, work in self._works.items():
                try:
                    work()
                except Exception:
                    log.exception("%s failed", what)
