"""A thread beside the event loop, for work that no response waits for: log lines and spans."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
log = logging.getLogger(__name__)

GATHER_S: Final = 0.05
"""How long items are gathered: waking a thread costs more than handing over an item."""
MOST_WAITING: Final = 20_000
"""Items that may wait. Further items are dropped and counted, so that a slow reader costs bounded memory."""
AT_ONCE: Final = 64
"""Items handled in one call. Between two calls the event loop can take the interpreter's lock."""


class BackgroundWorker(Generic[Item]):
    """Passes items in order to `handle` in a thread of its own. `put` never blocks."""

    def __init__(
        self,
        name: str,
        handle: Callable[[Sequence[Item]], None],
        report: Callable[[str], None] = log.warning,
    ) -> None:
        """Start the thread `name`.

        If `handle` raises, its items are lost and the error is logged. The thread calls `report` with a
        message when items were dropped.
        """
        self._dropped = 0
        self._dropping = threading.Lock()
        self._name = name
        self._handle = handle
        self._report = report
        self._items: deque[Item] = deque()
        self._woken = False
        self._wake = threading.Event()
        self._flush = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queue `item` for the thread, or drop it if too many items wait."""
        if len(self._items) >= MOST_WAITING:
            with self._dropping:
                self._dropped += 1
            return
        self._items.append(item)
        if not self._woken:
            self._woken = True
            self._wake.set()

    def flush_soon(self) -> None:
        """Make the thread handle the waiting items now instead of gathering more."""
        self._flush.set()
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Handle the waiting items and end the thread; False if that takes longer than `timeout_s`."""
        self._closed.set()
        self.flush_soon()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._flush.wait(GATHER_S)
            self._flush.clear()
            self._wake.clear()
            # An item that is put after this line wakes the thread again; `_drain` handles all earlier ones.
            self._woken = False
            self._drain()
        self._drain()

    def _drain(self) -> None:
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
