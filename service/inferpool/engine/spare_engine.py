"""An engine that has imported its libraries, and waits to take the place of one that ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from inferpool.engine.child_loop import ChildLoop, reap
from inferpool.engine.control import Message
from inferpool.engine.spawn import Child

log = logging.getLogger(__name__)

LEAST_SPARE_BYTES: Final = 512 * 2**20
"""With less memory for the server there is no spare engine: requests need what it would take."""
PAUSE_S: Final = 1.0
"""Pause until there is another spare engine, so that its start takes no time from an engine that loads."""
LATE_PAUSE_S: Final = 30.0
"""The same if the last spare engine has ended by itself."""


class SpareEngine:
    """Keeps one spare engine from the first `plan` on, until `stop`.

    Attributes:
        child: its process; None while there is none.
    """

    def __init__(self, loop: ChildLoop, spawn: Callable[[], Child]) -> None:
        """`spawn` starts an engine, which is not told what to load."""
        self.child: Child | None = None
        self._loop = loop
        self._spawn = spawn
        self._is_due = False
        self._stopped = False
        self._backends: set[str] = set()

    def plan(self, backends: Iterable[str] = (), pause_s: float = PAUSE_S) -> None:
        """Have a spare engine soon. It imports the runtimes of `backends`, and of those of earlier calls."""
        self._backends.update(backends)
        if self.child is None and not self._is_due:
            self._is_due = True
            self._loop.after(pause_s, self._start)

    def take(self) -> Child | None:
        """Return the process, which is the caller's from now on; None if there is none."""
        child, self.child = self.child, None
        if child is not None:
            self._loop.unwatch(child)
        return child

    def stop(self) -> None:
        """Start none any more."""
        self._stopped = True

    def _start(self) -> None:
        self._is_due = False
        if self._stopped:
            return
        try:
            self.child = child = self._spawn()
        except OSError as error:
            log.error("no spare engine can be started: %s", error)
            self.plan(pause_s=LATE_PAUSE_S)
            return
        child.control.send("prepare", {"backends": sorted(self._backends)}, wait=False)
        self._loop.watch(child, Message.close, self._ended)

    def _ended(self) -> None:
        assert self.child is not None
        how = reap(self.child)
        self.child = None
        if not self._stopped:
            log.error("the spare engine %s", how)
            self.plan(pause_s=LATE_PAUSE_S)
