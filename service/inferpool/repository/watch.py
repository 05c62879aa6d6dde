"""Watches the models folder, and has it looked at again when something changes.

`watchfiles` tells of changes at once. File systems without such events (NFS, many mounts of containers) are
looked at every `RESCAN_S` all the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from inferpool.repository.settled_sources import SettledSources

log = logging.getLogger(__name__)

RESCAN_S: Final = 10.0
"""How often the folder is looked at although nothing tells of a change."""
LOOK_S: Final = 0.2
"""How often it is looked at while files are still being copied."""
_DEBOUNCE_MS: Final = 100


class FolderWatch:
    """Threads that have a folder looked at: after changes, and whenever `look` is called."""

    def __init__(self, path: Path, rescan: Callable[[SettledSources], bool]) -> None:
        """`rescan` looks at the folder `path`; it returns whether files are still being copied."""
        self._path = path
        self._rescan = rescan
        self._settled = SettledSources(time.monotonic, time.time)
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._watching = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look at the folder whenever it changes."""
        self._watching = True
        self.look()
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def look(self) -> None:
        """Look at the folder now, in a thread."""
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rescan", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._wanted.set()

    def _run(self) -> None:
        waits = False
        while not self._closed.is_set():
            self._wanted.wait(LOOK_S if waits else RESCAN_S if self._watching else None)
            self._wanted.clear()
            if self._closed.is_set():
                return
            try:
                waits = self._rescan(self._settled)
            except Exception:
                # What is loaded goes on, and the next look may find the folder whole again.
                log.exception("%s cannot be looked at", self._path)

    def _listen(self) -> None:
        from watchfiles import watch

        try:
            changes = watch(
                self._path, watch_filter=None, debounce=_DEBOUNCE_MS, stop_event=self._closed,
                raise_interrupt=False,
            )  # fmt: skip
            for _ in changes:
                self._wanted.set()
        except Exception as error:  # noqa: BLE001 - no events are to be had here, so the clock must do
            log.warning("%s: changes are noticed only every %g s: %s", self._path, RESCAN_S, error)
