"""One connection as its exchanges see it: where their answers go, and whose turn it is.

It is what every request touches of a connection; what few do is its owner's, uvicorn's protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sized
from concurrent.futures import Executor
from typing import Any, Protocol

from inferpool.http.predict.predictor import Predictor


class ConnectionOwner(Protocol):
    """The protocol whose connection it is."""

    def next_exchange(self) -> None:
        """The answer is with the transport, and another request stands behind it: it has its turn."""

    def hold(self, exchange: Any) -> None:
        """Answer nothing more until the client has read what there is, then call `exchange.complete`."""

    def run_aside(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None],
        threads: Executor | None = None,
    ) -> None:
        """Call `function` in another thread (of `threads`), and `then` with what it returned or raised."""

    def mustered(self, data: bytes) -> None:
        """The muster has read what is no request whose head is known, or one whose turn it is not."""


class Connection:
    """A connection.

    Attributes:
        owner: whose it is, as long as it is there.
        predictor: what answers its requests.
        loop: the loop that it is on.
        transport: where its answers are written.
        descriptor: its socket, where what is written there goes to the client as it is; else -1.
        mustered: whether the muster reads for it, so that the transport does not.
        write_paused: whether its client leaves so much unread that no more is to be written.
        between: whether no part of a request has come behind the last whole one.
        within_head: whether a part of a head has come.
        cycle: the last request that has come: an `Exchange`, or uvicorn's own.
        answered: the request that is being answered.
        idle_since: when it had nothing more to do, by the loop's clock; None while it has.
        heard: when something came last.
        quiet_bytes: so many have come that completed neither a head nor a piece of a body.
    """

    __slots__ = (
        "_flow", "_pipeline", "_server_state", "answered", "between", "cycle", "descriptor", "heard",
        "idle_since", "loop", "mustered", "owner", "predictor", "quiet_bytes", "transport", "within_head",
        "write_paused",
    )  # fmt: skip

    def __init__(
        self, owner: ConnectionOwner, predictor: Predictor, loop: asyncio.AbstractEventLoop, server_state: Any
    ) -> None:
        self.owner: ConnectionOwner | None = owner
        self.predictor = predictor
        self.loop = loop
        self.descriptor = -1
        self.mustered = self.write_paused = self.within_head = False
        self.between = True
        self.cycle: Any = None
        self.answered: Any = None
        self.idle_since: float | None = None
        self.heard = 0.0
        self.quiet_bytes = 0
        self._server_state = server_state

    def made(self, transport: asyncio.Transport, flow: Any, pipeline: Sized) -> None:
        """It is there; `flow` is uvicorn's flow control of it, `pipeline` what awaits its turn."""
        self.transport = transport
        self._flow = flow
        self._pipeline = pipeline
        if transport.get_extra_info("sslcontext") is None:
            self.descriptor = transport.get_extra_info("socket").fileno()
        self.idle_since = self.loop.time()

    def lose(self) -> None:
        """It is gone."""
        # What refers to itself in a circle stays until the collector comes, and with it its body.
        self.owner = self.cycle = self.answered = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that uvicorn puts on all answers."""
        headers: list[tuple[bytes, bytes]] = self._server_state.default_headers
        return headers

    def resume_reading(self) -> None:
        """Have the transport read again, if it is not to wait for the answer to what it has read."""
        if not self._flow.read_paused:
            self.transport.resume_reading()

    def follows(self) -> bool:
        """Whether another request, or the beginning of one, stands behind the one that is being answered."""
        return self.within_head or bool(self._pipeline)

    def completed(self) -> None:
        """The answer is with the transport: the next request has its turn, or there is nothing to do."""
        self.answered = None
        if self._pipeline:
            if self.owner is not None:
                self.owner.next_exchange()
            return
        self._server_state.total_requests += 1
        if not self.transport.is_closing():
            if self._flow.read_paused:
                self._flow.resume_reading()
            self.idle_since = self.loop.time()

    def hold(self, exchange: Any) -> None:
        """Answer nothing more until the client has read what there is, then call `exchange.complete`.

        Where the connection is gone nothing happens: its exchanges are lost already.
        """
        if self.owner is not None:
            self.owner.hold(exchange)

    def run_aside(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None],
        threads: Executor | None = None,
    ) -> None:
        """Call `function` in another thread (of `threads`), and `then` with what it returned or raised.

        Where the connection is gone nothing happens: its exchanges are lost already.
        """
        if self.owner is not None:
            self.owner.run_aside(function, *arguments, then=then, threads=threads)
