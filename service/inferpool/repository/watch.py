"""Watches the models folder, and has it looked at again when something changes.

If the folder has the models of a store, the store is asked in between.

`watchfiles` tells of changes at once. File systems without such events (NFS, many mounts of containers) are
looked at every `RESCAN_S` all the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from inferpool.repository.settled_sources import SettledSources

log = logging.getLogger(__name__)

RESCAN_S: Final = 10.0
"""How often the folder is looked at although nothing tells of a change."""
LOOK_S: Final = 0.2
"""How often it is looked at while files are still being copied."""
_DEBOUNCE_MS: Final = 100


class Origin(Protocol):
    """Where the files of the folder come from.

    Attributes:
        pause_s: seconds between two questions whether there are others.
    """

    pause_s: float

    def ask(self, *, at_once: bool) -> None:
        """Bring the folder up to date. Without `at_once`, a question that was asked lately is enough."""


class FolderWatch:
    """Threads that have a folder looked at: after changes, and whenever `look` is called."""

    def __init__(
        self, path: Path, rescan: Callable[[SettledSources], bool], origin: Origin | None = None
    ) -> None:
        """`rescan` looks at the folder `path`; it returns whether files are still being copied."""
        self._path = path
        self._rescan = rescan
        self._origin = origin
        self._asked_at = time.monotonic()
        self._ask_at_once = False
        self._settled = SettledSources(time.monotonic, time.time)
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._watching = False
        self._thread: threading.Thread | None = None
        # The folder whose events are listened to, and what ends that.
        self._listened: tuple[int, int] | None = None
        self._moved = threading.Event()

    def start(self) -> None:
        """Look at the folder whenever it changes."""
        self._watching = True
        self._follow()
        self._look()

    def look(self) -> None:
        """Ask where the files come from, and look at the folder now, in a thread."""
        self._ask_at_once = True
        self._look()

    def _look(self) -> None:
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rescan", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._moved.set()
        self._wanted.set()

    def _pause_s(self) -> float:
        """How long to wait for a change before the next look."""
        if self._origin is None:
            return RESCAN_S
        return min(RESCAN_S, max(0.0, self._asked_at + self._origin.pause_s - time.monotonic()))

    def _run(self) -> None:
        waits = False
        while not self._closed.is_set():
            self._wanted.wait(LOOK_S if waits else self._pause_s() if self._watching else None)
            self._wanted.clear()
            if self._closed.is_set():
                return
            try:
                self._ask_origin()
                waits = self._rescan(self._settled)
            except Exception:
                # What is loaded goes on, and the next look may find the folder whole again.
                log.exception("%s cannot be looked at", self._path)
            if self._watching:
                self._follow()

    def _ask_origin(self) -> None:
        """Ask where the files come from if somebody wants that, or if it is time."""
        if self._origin is None:
            return
        at_once, self._ask_at_once = self._ask_at_once, False
        if at_once or (self._watching and time.monotonic() - self._asked_at >= self._origin.pause_s):
            self._origin.ask(at_once=at_once)
            self._asked_at = time.monotonic()

    def _follow(self) -> None:
        """Listen to the folder that the path names now; a link may have been switched, or a mount exchanged.

        Events come from a folder, whatever its path becomes.
        """
        try:
            status = self._path.stat()
        except OSError:
            return
        if self._listened != (status.st_dev, status.st_ino) and not self._closed.is_set():
            self._listened = (status.st_dev, status.st_ino)
            self._moved.set()
            self._moved = threading.Event()
            threading.Thread(target=self._listen, args=(self._moved,), name="watch", daemon=True).start()

    def _listen(self, over: threading.Event) -> None:
        from watchfiles import Change, watch

        own = self._path.absolute()
        try:
            changes = watch(
                self._path, watch_filter=None, debounce=_DEBOUNCE_MS, stop_event=over,
                raise_interrupt=False,
            )  # fmt: skip
            for found in changes:
                if any(what == Change.deleted and Path(name).absolute() == own for what, name in found):
                    # A folder made anew often has the same number, and this one has no more events.
                    self._listened = None
                self._wanted.set()
        except Exception as error:  # noqa: BLE001 - no events are to be had here, so the clock must do
            log.warning("%s: changes are noticed only every %g s: %s", self._path, RESCAN_S, error)
