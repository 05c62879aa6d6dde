"""The bound on the bytes that all requests in flight hold together."""

from __future__ import annotations

from inferpool.errors import BodyTooLarge, InferpoolError, Overloaded
from inferpool.http.predict.context import PredictContext


class ByteBudget:
    """Counts bytes of bodies, and of responses that clients do not read, against one limit.

    Each request's share is in its `PredictContext.reserved_bytes`. For the event loop alone; the
    `MemoryMonitor` sets the bounds from its thread.

    Attributes:
        limit: bytes that all requests may hold together.
        most: bytes that a request may hold while it is alone; at least `limit`.
        used: bytes that all requests hold now.
    """

    __slots__ = ("limit", "most", "used")

    def __init__(self, limit: int) -> None:
        self.limit = self.most = limit
        self.used = 0

    def check(self, size: int) -> None:
        """Raise an error if a body of `size` bytes would find no room now; reserve nothing.

        Raises BodyTooLarge or Overloaded.
        """
        if self.used + size > self.limit and (self.used or size > self.most):
            raise self._refusal(size, self.used, size)

    def reserve(self, context: PredictContext, size: int) -> None:
        """Reserve `size` more bytes for a request.

        A request that is alone gets more than `limit`, which may be a small setting, but never more than
        `most`: that much memory there is.

        Raises Overloaded if the other requests leave no room, BodyTooLarge if there is never room for it.
        """
        used = self.used + size
        if used > self.limit:
            others, own = self.used - context.reserved_bytes, context.reserved_bytes + size
            if others or own > self.most:
                raise self._refusal(size, others, own)
        self.used = used
        context.reserved_bytes += size

    def hold(self, context: PredictContext, size: int) -> None:
        """Count `size` bytes of a response that its client has not read; responses are never refused."""
        self.used += size
        context.reserved_bytes += size

    def release(self, context: PredictContext) -> None:
        """Give back all bytes of a request."""
        self.used -= context.reserved_bytes
        context.reserved_bytes = 0

    def _refusal(self, size: int, others: int, own: int) -> InferpoolError:
        """The error for `size` more bytes of a request that would then hold `own` beside `others`."""
        if own > self.most:
            return BodyTooLarge(
                f"the request takes {own} bytes of memory, and this server has {self.most} for one request;"
                " send fewer rows at a time",
                limit=self.most,
            )
        return Overloaded(
            f"no room for {size} bytes: other requests hold {others} of {self.limit} bytes; try again later"
        )
