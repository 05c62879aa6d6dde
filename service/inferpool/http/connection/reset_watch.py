"""Notices that a client which has ended its side of a connection is gone.

The event loop does not read such a connection any more, and would notice only when it writes.
"""

from __future__ import annotations

import select
import socket
from typing import Any, Final

from inferpool.http.connection.connection import Connection

_FIRST_LOOK_S: Final = 0.005
_RAREST_LOOK_S: Final = 1.0
_TCP_CLOSE: Final = 7
"""The state of a socket that was reset, in the kernel's `tcp_states.h`."""


def watch_for_reset(connection: Connection, after_s: float = _FIRST_LOOK_S) -> None:
    """Abort a connection whose client resets it; the first look is after `after_s`, the next ever later."""
    connection.loop.call_later(after_s, _look, connection, after_s)


def _look(connection: Connection, waited_s: float) -> None:
    transport = connection.transport
    if connection.owner is None or transport.is_closing():
        return
    if _is_reset(transport.get_extra_info("socket")):
        transport.abort()
    else:
        watch_for_reset(connection, min(_RAREST_LOOK_S, 4 * waited_s))


def _is_reset(connection: Any) -> bool:
    """Return whether the client has reset a connection, or has closed both sides of a Unix socket."""
    if connection.family == socket.AF_UNIX:
        poll = select.poll()
        poll.register(connection.fileno(), 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))
    state: bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state[0] == _TCP_CLOSE
