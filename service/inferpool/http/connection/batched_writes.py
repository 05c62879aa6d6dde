"""Writes the responses of one batch in one system-call loop, during which other threads run.

The bytes go past the transport of a connection. Those of TLS are encrypted before they are added.
"""

from __future__ import annotations

import logging
from typing import Protocol

try:
    from inferpool.http.connection import _socketio
except ImportError:  # there was no C compiler at installation, or the system is not Linux
    _socketio = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


class PendingWrite(Protocol):
    """An object whose bytes are written."""

    def sent(self, rest: bytes) -> None:
        """Take note that the socket has taken everything but `rest`."""

    def not_sent(self, error: Exception) -> None:
        """Take note that `error` has ended the writing; nobody knows how many bytes were written."""


class WriteBatcher:
    """Collects the responses that the results of one batch become, and writes them together.

    Writing takes a fifth of a small request's time. Each write by itself holds the GIL, and the instance that
    is to go on with the next batch waits for all of them.

    Attributes:
        collecting: whether `add` may be called.
    """

    __slots__ = ("_bodies", "_pending", "_sockets", "collecting")

    def __init__(self) -> None:
        self.collecting = False
        self._sockets: list[int] = []
        self._bodies: list[bytes] = []
        self._pending: list[PendingWrite] = []

    def begin(self) -> None:
        """Collect responses until `flush`, if the C module is there."""
        self.collecting = _socketio is not None

    def add(self, socket: int, body: bytes, pending: PendingWrite) -> None:
        """Write `body` at `flush`, then call `pending.sent`.

        `socket` is the descriptor of a connection whose transport has nothing else to write.
        """
        self._sockets.append(socket)
        self._bodies.append(body)
        self._pending.append(pending)

    def flush(self) -> None:
        """Write what was collected."""
        self.collecting = False
        sockets, bodies, pending = self._sockets, self._bodies, self._pending
        if not pending:
            return
        self._sockets, self._bodies, self._pending = [], [], []
        try:
            # A single response takes the usual way, by its transport, which costs no more.
            taken = [0] if len(pending) == 1 else _socketio.send_all(sockets, bodies)
        except MemoryError:
            taken = [0] * len(pending)  # each transport writes its own
        except Exception as error:  # noqa: BLE001 - each exchange logs it, and ends
            for write in pending:
                write.not_sent(error)
            return
        for index in range(len(pending)):  # compiled, `zip` takes longer than the rest of the loop
            body, size = bodies[index], taken[index]
            try:
                pending[index].sent(body[size:] if size < len(body) else b"")
            except Exception:
                # The other responses must be written all the same.
                log.exception("a response could not be written")
