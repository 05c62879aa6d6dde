"""The outbox, seen from the event loop: results of a batch arrive in one wake-up."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from inferpool.http.connection.batched_writes import WriteBatcher
from inferpool.pool.ports import Result

log = logging.getLogger(__name__)


class ResultDispatcher:
    """Hands each result to whoever waits for it. `put` may come from any thread, all else from the loop's."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, Callable[[Result], None]] = {}
        self._arrived: deque[Result] = deque()
        self._woken = False
        self.volley = WriteBatcher()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver on this loop from here on."""
        self._loop = loop

    def expect(self, entry_id: int, then: Callable[[Result], None]) -> None:
        """Call `then` with the entry's result; call `forget` if it is no longer of interest."""
        self._waiting[entry_id] = then

    def forget(self, entry_id: int) -> None:
        """Nobody waits for this entry any more; its result is thrown away when it comes."""
        self._waiting.pop(entry_id, None)

    def put(self, results: Sequence[Result]) -> None:
        """Take the results of a batch, from an instance's thread."""
        self._arrived.extend(results)
        if not self._woken and self._loop is not None:
            # Set before the call: a delivery that runs at once clears it again.
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        self.volley.load()
        while self._arrived:
            result = self._arrived.popleft()
            then = self._waiting.pop(result.entry_id, None)
            if then is None:
                continue
            try:
                then(result)
            except Exception:
                # Whoever waits for the next result must not pay for it.
                log.exception("the result of entry %d could not be delivered", result.entry_id)
        self.volley.fire()
