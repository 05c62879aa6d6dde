"""The state of one connection that every request on it needs.

Everything that few requests need is in `PredictProtocol`, the connection's owner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sized
from concurrent.futures import Executor
from typing import Any, Protocol

from inferpool.errors import InferpoolError, InternalError
from inferpool.http.access.caller import Caller
from inferpool.http.connection.shared import SharedState
from inferpool.http.connection.tls_transport import TlsTransport
from inferpool.system.listeners import client_address

log = logging.getLogger(__name__)


class ConnectionOwner(Protocol):
    """The protocol that the transport calls, as its connection sees it."""

    def data_received(self, data: bytes) -> None:
        """Take data that is not one complete request with a cached head."""

    def next_exchange(self) -> None:
        """Begin the turn of the next pipelined request."""

    def stop_reading(self) -> None:
        """Read nothing more from the connection, which ends with the current response."""

    def linger(self) -> None:
        """Close the connection once the client had time to read its response."""

    def watch_reading(self) -> None:
        """Close the connection if its client stops reading its response."""


class Connection:
    """A connection.

    Attributes:
        owner: the protocol of the connection; None once the connection is lost.
        shared: what all connections share.
        loop: the event loop of the connection.
        transport: where responses are written.
        client: the address of the client, without its port.
        keyless: the caller of requests without a key: whoever the certificate of the client names, if the
            server takes certificates for keys.
        tls: the transport, if the connection is one of TLS: it decrypts what is read from the descriptor, and
            encrypts what is written to it.
        descriptor: the socket, whose bytes may be read and written past the transport.
        batched: whether the `ReadBatcher` reads for this connection, and the transport does not.
        write_paused: whether the client leaves so much unread that nothing more may be written.
        between_requests: whether no part of a further request has been received after the last complete one.
        in_head: whether a head has been received in part.
        last: the last request that was received, an `Exchange` or uvicorn's `RequestResponseCycle`; may be
            complete.
        current: the request whose turn it is, of one of these classes; None if every response is complete.
        held: the exchange whose response the client has not read yet.
        idle_since: when the last response was complete, in seconds of the loop's clock; None while there is a
            request.
        reading_ended: whether nothing more is read: what the client still sends is of no use.
        last_received: when data was received last, in seconds of the loop's clock.
        unparsed_bytes: bytes received that completed neither a head nor a chunk of a body.
    """

    __slots__ = (
        "_flow", "_pipeline", "_server_state", "batched", "between_requests", "client", "current",
        "descriptor", "held", "idle_since", "in_head", "keyless", "last", "last_received", "loop", "owner",
        "reading_ended", "shared", "tls", "transport", "unparsed_bytes", "write_paused",
    )  # fmt: skip

    def __init__(
        self, owner: ConnectionOwner, shared: SharedState, loop: asyncio.AbstractEventLoop, server_state: Any
    ) -> None:
        """`server_state` is uvicorn's `ServerState`."""
        self.owner: ConnectionOwner | None = owner
        self.shared = shared
        self.loop = loop
        self.tls: TlsTransport | None = None
        self.descriptor = -1
        self.client = ""
        self.keyless: Caller = shared.gate.anonymous
        self.batched = self.write_paused = self.in_head = self.reading_ended = False
        self.between_requests = True
        self.last: Any = None
        self.current: Any = None
        self.held: Any = None
        self.idle_since: float | None = None
        self.last_received = 0.0
        self.unparsed_bytes = 0
        self._server_state = server_state

    def made(self, transport: Any, flow: Any, pipeline: Sized) -> None:
        """Take the transport, uvicorn's flow control of it, and the queue of pipelined requests."""
        self.transport = transport
        self._flow = flow
        self._pipeline = pipeline
        self.client = client_address(transport.get_extra_info("peername"))
        if isinstance(transport, TlsTransport):
            self.tls = transport
        self.descriptor = transport.get_extra_info("socket").fileno()
        self.idle_since = self.loop.time()

    def lose(self) -> None:
        """Forget the owner and the requests: the connection is lost."""
        # A cycle of references would stay, with the body of its request, until the garbage collector runs.
        if self.held is not None:
            self.shared.unread.remove(self)
        self.owner = self.last = self.current = self.held = None

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that uvicorn puts on all responses: a new list every second."""
        headers: list[tuple[bytes, bytes]] = self._server_state.default_headers
        return headers

    def is_read_paused(self) -> bool:
        """Return whether nothing more is read until earlier requests are answered."""
        paused: bool = self._flow.read_paused
        return paused

    def resume_reading(self) -> None:
        """Let the transport read again, unless earlier requests have to be answered first."""
        if not self._flow.read_paused:
            self.transport.resume_reading()

    def has_more_requests(self) -> bool:
        """Return whether another request, or the beginning of its head, follows the current one."""
        return self.in_head or bool(self._pipeline)

    def completed(self) -> None:
        """Begin the next request's turn, or wait for it: the current response is complete."""
        self.current = None
        if self._pipeline:
            if self.owner is not None:
                self.owner.next_exchange()
            return
        self._server_state.total_requests += 1
        if not self.transport.is_closing() and not self.reading_ended:
            if self._flow.read_paused:
                self._flow.resume_reading()
            self.idle_since = self.loop.time()

    def close(self) -> None:
        """Close the connection: its last response is written."""
        if self.reading_ended and self.owner is not None:
            self.owner.linger()
        else:
            self.transport.close()

    def hold(self, exchange: Any) -> None:
        """Call `exchange.complete` once the client has read its response; until then begin no other turn."""
        if self.owner is not None:  # otherwise the connection is lost, and so are its exchanges
            self.held = exchange
            self.shared.unread.add(self)
            self.owner.watch_reading()

    def resume_writing(self) -> None:
        """Complete the held exchange: the client reads again."""
        self.write_paused = False
        held, self.held = self.held, None
        if held is not None:
            self.shared.unread.remove(self)
            held.complete()

    def run_in_thread(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None],
        threads: Executor | None = None,
    ) -> None:
        """Call `function` in a thread, then on the loop `then` with what it returned, or with the error.

        Without `threads` the loop's own are used. The server does not stop before `then` was called.
        """
        running = self._server_state.tasks
        future = self.loop.run_in_executor(threads, _outcome, function, arguments)
        running.add(future)

        def finish(done: Any) -> None:
            running.discard(done)
            if not done.cancelled():  # as uvicorn does when it may wait no longer
                error = done.exception()  # there was no thread for the call
                then(done.result() if error is None else error)

        future.add_done_callback(finish)


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return what `function` returns, or the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - the caller responds with the error
        return _without_frames(error)
    except BaseException as fatal:  # another name than above: mypyc gives a name one type
        # A library that ends its thread must not leave the request without a response either.
        log.exception("%s raised %s", getattr(function, "__name__", function), type(fatal).__name__)
        return InternalError("the server failed on this request; its log says why")


def _without_frames(error: Exception) -> Exception:
    """Return `error`; if nobody logs its traceback, without it.

    The frames hold the body. A frame that also holds the error would keep it until garbage is collected.
    """
    if isinstance(error, (InferpoolError, MemoryError)):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    return error
