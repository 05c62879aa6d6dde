"""How many requests are in flight, and whether the server accepts more."""

from __future__ import annotations

import asyncio
import contextlib


class InFlight:
    """Counts requests, so that the server can stop without losing one. For the event loop alone.

    Attributes:
        requests: requests whose turn on their connection has begun and is not over. An exchange adds 1 when
            its turn begins, and calls `leave` at its end.
        accepted: requests that a queue has accepted and whose response is not written yet. The predictor adds
            1, and calls `release` at the end.
        closing: whether the server is to stop: the last response on each connection closes the connection.
        draining: whether new requests are refused.
    """

    __slots__ = ("_changed", "accepted", "closing", "draining", "requests")

    def __init__(self) -> None:
        self.requests = self.accepted = 0
        self.closing = self.draining = False
        # Made only for `wait_idle`, because setting an event takes as long as many a step of a request.
        self._changed: asyncio.Event | None = None

    def leave(self) -> None:
        """Count the end of a request: its client has the response, or is gone."""
        self.requests -= 1
        if self._changed is not None:
            self._changed.set()

    def release(self) -> None:
        """Count the response to an accepted request, or the loss of its client."""
        self.accepted -= 1
        if self._changed is not None:
            self._changed.set()

    async def wait_idle(self, grace_s: float) -> None:
        """Wait until every accepted request has its response.

        Requests whose bodies are incomplete get `grace_s` seconds to be accepted.
        """
        clock = asyncio.get_running_loop().time
        grace_ends = clock() + grace_s
        changed = self._changed = asyncio.Event()
        while self.requests and (self.accepted or clock() < grace_ends):
            changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), None if self.accepted else grace_ends - clock())
