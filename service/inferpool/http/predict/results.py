"""Brings the results of batches from the instances' threads to the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from inferpool.pool.ports import Result

log = logging.getLogger(__name__)


class ResultDispatcher:
    """The pool's outbox: calls the subscriber of each result on the event loop, with one wake-up a batch.

    `put` may be called from any thread, everything else from the event loop's thread only.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers: dict[int, Callable[[Result], None]] = {}
        self._arrived: deque[Sequence[Result]] = deque()
        self._woken = False
        self._begin: Callable[[], None] | None = None
        self._flush: Callable[[], None] | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver results on `loop` from now on."""
        self._loop = loop

    def later(self, call: Callable[[], None]) -> None:
        """Call `call` in a later iteration of the loop: after the responses that are being written.

        May be called from any thread. Does nothing once the loop is closed.
        """
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(call)

    def wrap_batches(self, begin: Callable[[], None], flush: Callable[[], None]) -> None:
        """Call `begin` before the subscribers of results that arrived together, and `flush` after them."""
        self._begin, self._flush = begin, flush

    def subscribe(self, entry_id: int, then: Callable[[Result], None]) -> None:
        """Call `then` once, with the result of the entry."""
        self._subscribers[entry_id] = then

    def unsubscribe(self, entry_id: int) -> bool:
        """Discard the result of the entry when it arrives; False if it has arrived, or nobody subscribed."""
        return self._subscribers.pop(entry_id, None) is not None

    def put(self, results: Sequence[Result]) -> None:
        """Take the results of a batch from an instance's thread."""
        self._arrived.append(results)
        if not self._woken and self._loop is not None:
            # Set before the call, because a delivery that runs at once clears it again.
            self._woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def ended(self, entry_ids: Sequence[int]) -> None:
        """Do nothing: inputs that are arrays of this process live as long as a run reads them."""

    def deliver(self, results: Sequence[Result]) -> None:
        """Call the subscribers of results that arrived together, at once. On the event loop only."""
        self._arrived.append(results)
        self._deliver()

    def _deliver(self) -> None:
        self._woken = False
        if self._begin is not None:
            self._begin()
        while self._arrived:
            for result in self._arrived.popleft():
                then = self._subscribers.pop(result.entry_id, None)
                if then is None:
                    continue
                try:
                    then(result)
                except Exception:
                    # The other results must be delivered all the same.
                    log.exception("the result of entry %d could not be delivered", result.entry_id)
        if self._flush is not None:
            self._flush()
