"""What is left for when every connection that has something to read has been read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class DeferredCalls:
    """Calls that are made together at the end of one turn of the loop.

    One callback of the loop does for all of them, where one each would cost as much as the call.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[[Any], None], Any]] = []

    def at_end(self, loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], argument: Any) -> None:
        """Make `call` with `argument` then."""
        if not self._calls:
            loop.call_soon(self._end)
        self._calls.append((call, argument))

    def _end(self) -> None:
        calls, self._calls = self._calls, []
        for call, argument in calls:
            try:
                call(argument)
            except Exception:
                # The requests behind it must not pay for it.
                log.exception("%s failed at the end of a turn", getattr(call, "__qualname__", call))
