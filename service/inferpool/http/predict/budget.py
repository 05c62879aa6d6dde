"""The bound on the bytes that all requests in flight hold together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from inferpool.allowance import Allowance
from inferpool.errors import BodyTooLarge, DeadlineExceeded, InferpoolError, InvalidInput, Overloaded
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.picture_urls import MOST_S, PictureUrls
from inferpool.system.cpu_pace import PACE
from inferpool.tensors import Signature

_ANSWERS_SHARE: Final = 0.75
"""The share of all bytes that large answers may hold, so that bodies always find room."""
_CLIENT_SHARE: Final = 0.5
"""The share of all bytes that the large answers to one client may hold, while it has several."""
SMALL_BYTES: Final = 64 * 1024
"""A request that holds no more in total may take the last bytes of the limit."""
_SMALL_SHARE: Final = 16
_MOST_SMALL_BYTES: Final = 8 * 2**20
"""This share of the limit, and at most so many bytes, are for small requests alone."""
_LOOK_S: Final = 0.05
"""Pause between two looks of a thread that waits for memory: responses free theirs without notice."""


class ByteBudget:
    """Counts bytes of bodies, of what they become, of large answers, and of responses that are not read.

    Each request's share is in its `PredictContext`: `reserved_bytes` of bodies and responses, and
    `decoded_bytes` of what threads make of bodies. The former are for the event loop alone, the latter for
    any thread. The `MemoryMonitor` sets the bounds from its own thread.

    Attributes:
        limit: bytes that all requests may hold together.
        shared: those bytes of the limit that requests of any size may hold; the rest is for small ones.
        most: bytes that a request may hold while it is alone; at least `shared`.
        used: bytes of bodies and responses that all requests hold now.
        decoded: bytes that all requests hold now of what their bodies became.
        answers: those of the used bytes that are for large answers and unread responses.
        make_room: called on the event loop before a request is refused; disconnects clients that do not read.
        heap_bytes: bytes of the heap that bodies may take before they are received.
    """

    __slots__ = (
        "_by_client", "_changed", "_decoding", "_limit", "answers", "decoded", "heap_bytes", "make_room",
        "most", "shared", "used",
    )  # fmt: skip

    def __init__(self, limit: int) -> None:
        self._limit = self.shared = 0
        self.limit = self.most = self.heap_bytes = limit
        self.used = self.decoded = self.answers = 0
        self.make_room: Callable[[], None] | None = None
        self._by_client: dict[str, int] = {}
        # Bytes of `decoded` that threads may give back soon: they decode, and wait for no memory.
        self._decoding = 0
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Bytes that all requests may hold together."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self.shared = limit - min(limit // _SMALL_SHARE, _MOST_SMALL_BYTES)

    @property
    def held(self) -> int:
        """Bytes that all requests hold now."""
        return self.used + self.decoded

    @property
    def answers_limit(self) -> int:
        """Bytes that large answers and unread responses may hold together."""
        return int(_ANSWERS_SHARE * self.limit)

    def check(self, size: int) -> None:
        """Raise an error if a body of `size` bytes would find no room now; reserve nothing.

        Raises BodyTooLarge or Overloaded.
        """
        if self.used + self.decoded + size > self.shared and not self._has_room(size):
            self._make_room()
            if not self._has_room(size):
                raise self._refusal(size, self.used + self.decoded, size)

    def reserve(self, context: PredictContext, size: int) -> None:
        """Reserve `size` more bytes of body for a request.

        A request that is alone gets more than `limit`, which may be a small setting, but never more than
        `most`: that much memory there is.

        Raises Overloaded if the other requests leave no room, BodyTooLarge if there is never room for it.
        """
        if self.used + self.decoded + size > self.shared:
            refusal = self._refusal_of(context, size)
            if refusal is not None:
                self._make_room()
                refusal = self._refusal_of(context, size)
                if refusal is not None:
                    raise refusal
        self.used += size
        context.reserved_bytes += size

    def reserve_answer(self, context: PredictContext, size: int, client: str) -> None:
        """Reserve `size` more bytes for the large answer to a request of `client`, its address.

        Raises Overloaded if the other requests, or other answers, leave no room.
        """
        refusal = self._answer_refusal(context, size, client)
        if refusal is not None:
            self._make_room()
            refusal = self._answer_refusal(context, size, client)
            if refusal is not None:
                raise refusal
        self.hold(context, size, client)

    def hold(self, context: PredictContext, size: int, client: str) -> None:
        """Count `size` bytes of a response that `client` has not read; such responses are never refused."""
        self.used += size
        context.reserved_bytes += size
        self.answers += size
        context.answer_bytes += size
        context.client = client
        self._by_client[client] = self._by_client.get(client, 0) + size

    def shrink_answer(self, context: PredictContext, size: int) -> None:
        """Give back what the answer to a request holds beyond `size` bytes."""
        surplus = context.answer_bytes - size
        if surplus > 0:
            self.used -= surplus
            context.reserved_bytes -= surplus
            self._give_back(context, surplus)

    def release(self, context: PredictContext) -> None:
        """Give back all bytes of a request, whose body no thread decodes any more."""
        self.used -= context.reserved_bytes
        context.reserved_bytes = 0
        if context.answer_bytes:
            self._give_back(context, context.answer_bytes)
        if context.decoded_bytes:
            with self._changed:
                self.decoded -= context.decoded_bytes
                context.decoded_bytes = 0
                self._changed.notify_all()

    def take_decoded(self, context: PredictContext, size: int, what: str) -> None:
        """Reserve `size` more bytes for `what` a thread makes of a body, in that thread.

        Waits while there would be room without the bodies that other threads decode now: they are done soon.
        Raises the errors of `reserve`.
        """
        with self._changed:
            held = context.decoded_bytes
            own = context.reserved_bytes + held + size
            if own > self.most:
                raise BodyTooLarge(
                    f"{what} takes {own} bytes of memory with the body, and this server has {self.most} for"
                    " one request; send fewer rows, or a smaller picture, at a time",
                    limit=self.most,
                )
            self._decoding -= held
            self._changed.notify_all()
            try:
                limit = self._limit if own <= SMALL_BYTES else self.shared
                while self.used + self.decoded + size > limit and self.used + self.decoded > own - size:
                    if self.used + self.decoded - self._decoding + size > limit:
                        raise self._refusal(size, self.used + self.decoded - own + size, own)
                    self._changed.wait(_LOOK_S)
            finally:
                self._decoding += held
            self._decoding += size
            self.decoded += size
            context.decoded_bytes = held + size

    def give_back_decoded(self, context: PredictContext, size: int) -> None:
        """Release `size` of the bytes that `take_decoded` reserved, while the thread still decodes."""
        with self._changed:
            self._decoding -= size
            self.decoded -= size
            context.decoded_bytes -= size
            self._changed.notify_all()

    def settle_decoded(self, context: PredictContext, size: int) -> None:
        """Count the `size` bytes of its tensors for a request whose body has been decoded.

        Tensors for which nothing was taken are views of the body.
        """
        with self._changed:
            size = min(size, context.decoded_bytes)
            self._decoding -= context.decoded_bytes
            self.decoded += size - context.decoded_bytes
            context.decoded_bytes = size
            self._changed.notify_all()

    def _give_back(self, context: PredictContext, size: int) -> None:
        self.answers -= size
        context.answer_bytes -= size
        left = self._by_client[context.client] - size
        if left:
            self._by_client[context.client] = left
        else:
            del self._by_client[context.client]

    def _has_room(self, size: int) -> bool:
        """Return whether a request of `size` bytes, which holds nothing yet, would find room."""
        held = self.used + self.decoded
        limit = self._limit if size <= SMALL_BYTES else self.shared
        return held + size <= limit or (not held and size <= self.most)

    def _make_room(self) -> None:
        if self.make_room is not None:
            self.make_room()

    def _refusal_of(self, context: PredictContext, size: int) -> InferpoolError | None:
        others = self.held - context.reserved_bytes - context.decoded_bytes
        own = context.reserved_bytes + context.decoded_bytes + size
        limit = self._limit if own <= SMALL_BYTES else self.shared
        if own > self.most or (others and self.held + size > limit):
            return self._refusal(size, others, own)
        return None

    def _answer_refusal(self, context: PredictContext, size: int, client: str) -> InferpoolError | None:
        if self.held + size > self.shared:
            refusal = self._refusal_of(context, size)
            if refusal is not None:
                return refusal
        others = self.answers - context.answer_bytes
        if others and self.answers + size > self.answers_limit:
            return Overloaded(
                f"no room for an answer of about {size} bytes: other answers hold {others} of"
                f" {self.answers_limit} bytes; try again later"
            )
        of_client = self._by_client.get(client, 0)
        client_limit = int(_CLIENT_SHARE * self.limit)
        if of_client > context.answer_bytes and of_client + size > client_limit:
            return Overloaded(
                f"no room for an answer of about {size} bytes: other answers to this client hold"
                f" {of_client - context.answer_bytes} of {client_limit} bytes; read them first"
            )
        return None

    def _refusal(self, size: int, others: int, own: int) -> InferpoolError:
        """The error for `size` more bytes of a request that would then hold `own` beside `others`."""
        if own > self.most:
            return BodyTooLarge(
                f"the request takes {own} bytes of memory, and this server has {self.most} for one request;"
                " send fewer rows at a time",
                limit=self.most,
            )
        limit = self._limit if own <= SMALL_BYTES else self.shared
        return Overloaded(
            f"no room for {size} bytes: other requests hold {others} of {limit} bytes; try again later"
        )


class BodyAllowance(Allowance):
    """Grants memory of the budget, and pictures of others, to the thread that decodes one body."""

    __slots__ = ("_budget", "_context", "_deadline", "_pictures", "_until")

    def __init__(
        self,
        budget: ByteBudget,
        context: PredictContext,
        most_bytes: int,
        signature: Signature | None,
        pictures: PictureUrls | None = None,
        deadline: Callable[[PredictContext], float] | None = None,
    ) -> None:
        """Take the memory from `budget`, for the request `context`.

        `pictures` fetches those whose URLs a body has, until the `deadline` of the request, which is a moment
        of `time.monotonic`; None if the server fetches none.
        """
        super().__init__(most_bytes, signature)
        self._budget = budget
        self._context = context
        self._pictures = pictures
        self._deadline = deadline
        self._until = 0.0

    def take(self, size: int, what: str) -> None:
        """Reserve `size` bytes; see `ByteBudget.take_decoded`."""
        PACE.step()
        self._budget.take_decoded(self._context, size, what)

    def give_back(self, size: int) -> None:
        """Release `size` bytes."""
        self._budget.give_back_decoded(self._context, size)

    def fetch_picture(self, url: str) -> bytes:
        """Return the file at `url`; see `PictureUrls.fetch`. Raises DeadlineExceeded, too."""
        if self._pictures is None or self._deadline is None:
            return super().fetch_picture(url)
        now = time.monotonic()
        # The body may have a timeout, so the deadline is known only now.
        deadline = self._deadline(self._context)
        self._until = self._until or now + MOST_S
        try:
            return self._pictures.fetch(url, self, min(deadline, self._until))
        except InvalidInput:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("the deadline passed while a picture was fetched") from None
            raise
