"""Memory for messages of gRPC, whose size is not known until they are there.

A body of HTTP announces its length, and its memory is reserved before it is read. Here a message gets a
small part at first, which is enough for most messages. A message that takes longer than a moment to receive
is large or slow, and has to reserve as much as the largest message may have. That limits how many such
messages are received at once, and small ones are received beside them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from inferpool.errors import InferpoolError, Overloaded, RateLimited, TooSlow

FIRST_BYTES: Final = 64 * 1024
"""What a message reserves at first."""
SMALL_BYTES: Final = 256 * FIRST_BYTES
"""Large messages leave so much to small ones."""
MOMENT_S: Final = 0.25
"""How long a message may take until it has to reserve what the largest one takes."""
READ_S: Final = 60.0
"""How long a message may take to be received."""
COPIES: Final = 2
"""A message, and the body that is made of it, are in memory at once for a moment."""


class MessageBudget:
    """Counts the bytes of all messages of the process. For one event loop."""

    def __init__(self, total_bytes: int, most_bytes: int) -> None:
        """All messages together may take `total_bytes`, each of them at most `most_bytes`."""
        self._most = COPIES * most_bytes
        # The largest message is received if it is the only large one.
        self._total = self._free = max(total_bytes, self._most + SMALL_BYTES)
        self._streams: dict[str, int] = {}
        self._most_streams = max(self._total // 2, self._most) // self._most

    def take(self, size: int, leave: int = 0) -> bool:
        """Reserve `size` bytes; False if they are not free, or if less than `leave` would stay free."""
        if size > self._free - leave:
            return False
        self._free -= size
        return True

    def could_take(self, size: int) -> bool:
        """Return whether `size` bytes can be reserved at all."""
        return size <= self._total

    def give(self, size: int) -> None:
        """Free `size` bytes that are reserved."""
        self._free += size

    def take_for_stream(self, tenant: str | None) -> int:
        """Reserve what the largest message of a stream of `tenant` takes, and return it.

        Raises RateLimited if the tenant has half of all streams that there is room for; None means that the
        server knows no tenants. Raises Overloaded if all streams would then hold more than half of all bytes.
        """
        own = self._streams.get(tenant or "", 0)
        most = max(1, self._most_streams // 2)
        if tenant is not None and own >= most:
            raise RateLimited(
                f"the tenant has {own} open streams, and {most} is the most; end one, send the requests one"
                " by one, or have the operator lower --max-body-bytes, so that more streams fit",
                limit=most,
            )
        if sum(self._streams.values()) >= self._most_streams or not self.take(self._most, leave=SMALL_BYTES):
            raise Overloaded(
                f"the server has no room for another stream, each of which takes {self._most} bytes; end one,"
                " or send the requests one by one"
            )
        self._streams[tenant or ""] = own + 1
        return self._most

    def give_for_stream(self, size: int, tenant: str | None) -> None:
        """Free what a stream of `tenant` has reserved."""
        left = self._streams[tenant or ""] = self._streams[tenant or ""] - 1
        if not left:
            del self._streams[tenant or ""]
        self.give(size)

    @property
    def most(self) -> int:
        """What the largest message takes, in bytes."""
        return self._most


class ReceivedMessage:
    """One message from its first byte on; its memory is reserved until `close`."""

    __slots__ = ("_budget", "_error", "_held", "_task", "_timer")

    def __init__(self, budget: MessageBudget) -> None:
        """Reserve the first part. Raises Overloaded if there is no room."""
        self._budget = budget
        self._error: InferpoolError | None = None
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held = min(FIRST_BYTES, budget.most)
        if not budget.take(self._held):
            self._held = 0
            raise Overloaded("the server has no room for another message; try again later")

    async def read(self, receive: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return what `receive` returns. Raises Overloaded if a large message finds no room, or TooSlow."""
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = loop.call_later(MOMENT_S, self._reserve_all, loop)
        try:
            data = await receive()
        except asyncio.CancelledError:
            if self._error is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._error from None
        finally:
            self._timer.cancel()
            self._task = None
        self._hold(min(COPIES * len(data), self._budget.most))
        return data

    def close(self) -> None:
        """Free the memory."""
        self._hold(0)

    def _hold(self, size: int) -> None:
        self._budget.give(self._held - size)
        self._held = size

    def _reserve_all(self, loop: asyncio.AbstractEventLoop) -> None:
        more = self._budget.most - self._held
        if more > 0 and not self._budget.take(more, leave=SMALL_BYTES):
            self._stop(Overloaded("the server has no room for another large message; try again later"))
            return
        self._held += more
        text = f"the message was not received within {READ_S:g} s; send it faster, or in smaller requests"
        self._timer = loop.call_later(READ_S, self._stop, TooSlow(text))

    def _stop(self, error: InferpoolError) -> None:
        if self._task is not None:
            self._error = error
            self._task.cancel()
