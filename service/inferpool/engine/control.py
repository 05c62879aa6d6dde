"""Messages between the supervisor and its children: small JSON objects, with descriptors beside them.

Each child has one socket of the kind SOCK_SEQPACKET to the supervisor, which keeps the bounds of messages.
Tensors never pass here, and catalogs pass as descriptors of memory files.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

MOST_BYTES: Final = 128 * 1024
"""Size of the largest message."""
_MOST_DESCRIPTORS: Final = 64


class Message(NamedTuple):
    """A message that has arrived. The receiver owns the descriptors, and closes them.

    Attributes:
        kind: what the message says, a word.
        values: the facts, by name.
        descriptors: those that came with the message.
    """

    kind: str
    values: dict[str, Any]
    descriptors: Sequence[int] = ()

    def close(self) -> None:
        """Close the descriptors of a message that nobody wants."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class ControlSocket:
    """One end of the socket between the supervisor and a child.

    `send` may be called from any thread, `receive` from one.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Use `connection` without blocking."""
        connection.setblocking(False)
        self._socket = connection
        self._sending = threading.Lock()
        self._waiting: deque[tuple[bytes, list[int]]] = deque()

    def fileno(self) -> int:
        """The descriptor, for selectors; −1 once the socket is closed."""
        return self._socket.fileno()

    def send(
        self, kind: str, values: Mapping[str, Any] = {}, descriptors: Sequence[int] = (), *, wait: bool = True
    ) -> None:
        """Send a message; the descriptors are duplicated, and remain the caller's.

        `wait` waits for room in the socket. Without it, messages that find no room are kept until `flush`.
        Nothing happens if the other end is gone: its reader learns of that by itself.

        Raises ValueError if the message is larger than MOST_BYTES.
        """
        data = json.dumps({"kind": kind, **values}, separators=(",", ":")).encode()
        if len(data) > MOST_BYTES:
            raise ValueError(f"a control message of {len(data)} bytes; at most {MOST_BYTES} are allowed")
        with self._sending:
            self._waiting.append((data, [os.dup(descriptor) for descriptor in descriptors]))
            while not self._flush() and wait:
                select.select([], [self._socket], [])

    def flush(self) -> bool:
        """Send what waits, as far as there is room; False if something still waits."""
        with self._sending:
            return self._flush()

    def receive(self) -> Message | None:
        """The next message; None if there is none now. Raises EOFError if the other end is closed."""
        try:
            data, descriptors, flags, _ = socket.recv_fds(
                self._socket, MOST_BYTES + 1, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except ConnectionError:
            raise EOFError from None
        if not data:
            raise EOFError
        values = json.loads(data)
        message = Message(values.pop("kind"), values, descriptors)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            message.close()
            raise EOFError("a control message is incomplete")
        return message

    def wait(self) -> Message:
        """Wait for the next message. Raises EOFError if the other end is closed."""
        while (message := self.receive()) is None:
            select.select([self._socket], [], [])
        return message

    def close(self) -> None:
        """Close the socket and what waits."""
        with self._sending:
            while self._waiting:
                self._drop_first()
            self._socket.close()

    def _flush(self) -> bool:
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                socket.send_fds(self._socket, [data], descriptors)
            except BlockingIOError:
                return False
            except OSError:
                pass  # the other end is gone
            self._drop_first()
        return True

    def _drop_first(self) -> None:
        for descriptor in self._waiting.popleft()[1]:
            os.close(descriptor)


def control_pair() -> tuple[ControlSocket, socket.socket]:
    """The supervisor's end of a new control socket, and the end that a child inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 2 * MOST_BYTES)
    return ControlSocket(ours), theirs
