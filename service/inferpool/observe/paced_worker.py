"""A thread beside the event loop that takes at most a small share of a core, whatever it is given.

`BackgroundWorker` handles all it is given as soon as it can. This one rests after its work, so that what it
does for some requests cannot slow down others: what it cannot do in its share is dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from inferpool.system.cpu_pace import yield_to_others

Item = TypeVar("Item")
log = logging.getLogger(__name__)

SHARE: Final = 0.01
"""The share of a core that the thread may take."""
GATHER_S: Final = 1.0
"""How long items are gathered, unless many wait: waking the thread and a transaction take more time than an
item, and requests that come meanwhile wait, so there must be few such moments."""
AT_ONCE: Final = 16
"""Items handled in one call."""
LONGEST_REST_S: Final = 5.0
MOST_WAITING: Final = 256


class PacedWorker(Generic[Item]):
    """Passes items in order to `handle` in a thread of its own. `offer` never blocks, and has one caller."""

    def __init__(
        self, name: str, handle: Callable[[Sequence[Item]], None], tick: Callable[[], None], tick_s: float
    ) -> None:
        """Start the thread `name`, which also calls `tick` about every `tick_s` seconds.

        If `handle` or `tick` raises, the error is logged, and the items are lost.
        """
        self._handle = handle
        self._tick = tick
        self._tick_s = tick_s
        self._name = name
        self._items: deque[Item] = deque()
        self._woken = False
        self._wake = threading.Event()
        self._many_wait = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def has_room(self) -> bool:
        """Whether an item may be offered."""
        return len(self._items) < MOST_WAITING

    def offer(self, item: Item) -> bool:
        """Queue `item` for the thread; False if too many wait."""
        if not self.has_room():
            return False
        self._items.append(item)
        if len(self._items) == MOST_WAITING // 2:
            self._many_wait.set()
        if not self._woken:
            self._woken = True
            self._wake.set()
        return True

    def close(self, timeout_s: float) -> bool:
        """Handle the waiting items and end the thread; False if that takes longer than `timeout_s`."""
        self._closed.set()
        self._many_wait.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        yield_to_others()
        next_tick = time.monotonic() + self._tick_s
        while not self._closed.is_set():
            if self._wake.wait(max(0.0, next_tick - time.monotonic())):
                self._wake.clear()
                self._many_wait.wait(GATHER_S)
                self._many_wait.clear()
                # An item that is offered after this line wakes the thread again.
                self._woken = False
                while self._items and not self._closed.is_set():
                    self._work(self._handle_some)
            if time.monotonic() >= next_tick:
                self._work(self._tick)
                next_tick = time.monotonic() + self._tick_s
        while self._items:
            self._safely(self._handle_some)
        self._safely(self._tick)

    def _work(self, work: Callable[[], None]) -> None:
        """Do a piece of work, and rest until it has taken no more than the thread's share."""
        began = time.thread_time()
        self._safely(work)
        used_s = time.thread_time() - began
        self._closed.wait(min(LONGEST_REST_S, used_s * (1 / SHARE - 1)))

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            log.exception("%s: an error was ignored", self._name)

    def _handle_some(self) -> None:
        self._handle([self._items.popleft() for _ in range(min(AT_ONCE, len(self._items)))])
