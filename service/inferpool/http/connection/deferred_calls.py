"""Calls that are made at the end of one iteration of the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class DeferredCalls:
    """Makes calls after every connection that has something to read has been read.

    The loop is given one callback for all calls of an iteration. One callback for each would cost as much as
    the call itself.
    """

    __slots__ = ("_calls",)

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[[Any], None], Any]] = []

    def defer(self, loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], argument: Any) -> None:
        """Make `call` with `argument` at the end of this iteration of `loop`, which is always the same."""
        if not self._calls:
            loop.call_soon(self._run)
        self._calls.append((call, argument))

    def _run(self) -> None:
        calls, self._calls = self._calls, []
        for call, argument in calls:
            try:
                call(argument)
            except Exception:
                # The calls behind this one belong to other requests.
                log.exception("the deferred call of %s failed", getattr(call, "__qualname__", call))
