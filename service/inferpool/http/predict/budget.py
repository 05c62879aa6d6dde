"""The bound on the bytes that all requests in flight hold together."""

from __future__ import annotations

from inferpool.errors import Overloaded
from inferpool.http.predict.context import PredictContext


class ByteBudget:
    """Counts bytes of bodies, and of responses that clients do not read, against one limit.

    Each request's share is in its `PredictContext.reserved_bytes`. For the event loop alone.

    Attributes:
        limit: bytes that all requests may hold together.
        used: bytes that they hold now.
    """

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def check(self, size: int) -> None:
        """Raise Overloaded if a body of `size` bytes would find no room now; reserve nothing."""
        if self.used and self.used + size > self.limit:
            raise self._overloaded(size, self.used)

    def reserve(self, context: PredictContext, size: int) -> None:
        """Reserve `size` more bytes of body; raises Overloaded if the other requests leave no room.

        A request that is alone gets its bytes whatever their number: the limit must not make it impossible.
        """
        others = self.used - context.reserved_bytes
        if others and self.used + size > self.limit:
            raise self._overloaded(size, others)
        self.used += size
        context.reserved_bytes += size

    def hold(self, context: PredictContext, size: int) -> None:
        """Count `size` bytes of a response that its client has not read; responses are never refused."""
        self.used += size
        context.reserved_bytes += size

    def release(self, context: PredictContext) -> None:
        """Give back all bytes of a request."""
        self.used -= context.reserved_bytes
        context.reserved_bytes = 0

    def _overloaded(self, size: int, others: int) -> Overloaded:
        return Overloaded(
            f"no room for {size} bytes: other requests hold {others} of {self.limit} bytes; try again later"
        )
