"""The answers of one batch, written together, so that other threads run while the kernel takes them."""

from __future__ import annotations

import logging
from typing import Protocol

try:
    from inferpool.http.connection import _socketio
except ImportError:  # there was no compiler where the package was built, or no such sockets as it wants
    _socketio = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


class PendingWrite(Protocol):
    """One that has something to be written."""

    def sent(self, left: bytes) -> None:
        """The socket has taken all but `left`."""


class WriteBatcher:
    """What is to be written when the last result of a batch has become an answer.

    Writing takes a fifth of a small request's time. Done one by one it holds the interpreter's lock each
    time, and the instance that wants to go on with the next batch waits for all of them.
    """

    def __init__(self) -> None:
        self.loading = False
        self._sockets: list[int] = []
        self._bodies: list[bytes] = []
        self._shots: list[PendingWrite] = []

    def load(self) -> None:
        """From here on answers are kept until `fire`."""
        self.loading = _socketio is not None

    def add(self, socket: int, body: bytes, shot: PendingWrite) -> None:
        """Have `body` written to a descriptor on whose transport nothing waits to be written."""
        self._sockets.append(socket)
        self._bodies.append(body)
        self._shots.append(shot)

    def fire(self) -> None:
        """Write what has been kept."""
        self.loading = False
        sockets, bodies, shots = self._sockets, self._bodies, self._shots
        if not shots:
            return
        self._sockets, self._bodies, self._shots = [], [], []
        try:
            taken = [0] if len(shots) == 1 else _socketio.send_all(sockets, bodies)
        except MemoryError:
            taken = [0] * len(shots)  # each by itself, then
        for shot, body, size in zip(shots, bodies, taken, strict=True):
            try:
                shot.sent(body[size:])
            except Exception:
                # Those behind it must not pay for it.
                log.exception("an answer could not be written")
