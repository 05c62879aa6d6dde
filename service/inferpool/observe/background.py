"""Work that requests leave behind, done by a thread beside the event loop."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
log = logging.getLogger(__name__)

GATHER_S: Final = 0.05
"""How long items gather: to wake a thread costs more than to hand over an item."""
MOST_WAITING: Final = 20_000
"""More items are dropped and counted: a reader who is too slow must not cost memory without end."""
AT_ONCE: Final = 64
"""Items handled in one call; between calls the event loop gets its turn."""


class BackgroundWorker(Generic[Item]):
    """Hands items to `handle`, in order, in a thread of its own. `put` never blocks."""

    def __init__(
        self,
        name: str,
        handle: Callable[[Sequence[Item]], None],
        report: Callable[[str], None] = log.warning,
    ) -> None:
        """`name` is the thread's; an exception of `handle` loses the items it was called with.

        `report` is told, in the thread, of items that were dropped.
        """
        self._dropped = 0
        self._dropping = threading.Lock()
        self._name = name
        self._handle = handle
        self._report = report
        self._items: deque[Item] = deque()
        self._woken = False
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Leave `item` to the thread, or drop it where too many wait."""
        if len(self._items) >= MOST_WAITING:
            with self._dropping:
                self._dropped += 1
            return
        self._items.append(item)
        if not self._woken:
            self._woken = True
            self._wake.set()

    def hurry(self) -> None:
        """Let the thread handle what waits now, without gathering more."""
        self._hurry.set()
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Handle what waits and end the thread; False if that took longer than `timeout_s`."""
        self._closed.set()
        self.hurry()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _live(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._hurry.wait(GATHER_S)
            self._hurry.clear()
            self._wake.clear()
            # From here on an item wakes the thread again; one that was put before is handled below.
            self._woken = False
            self._work_off()
        self._work_off()

    def _work_off(self) -> None:
        while self._items:
            items = [self._items.popleft() for _ in range(min(AT_ONCE, len(self._items)))]
            try:
                self._handle(items)
            except Exception:
                log.exception("%s lost %d items", self._name, len(items))
        with self._dropping:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._report(f"{self._name} was too slow: {dropped} items were dropped")
