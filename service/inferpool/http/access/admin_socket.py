"""A Unix socket whose requests need no key: only the user of the server can open it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from inferpool.http.access.caller import ADMIN, ANY_KEY, METRICS, PREDICT, READ, Caller
from inferpool.system.listeners import listen_unix

ADMIN_SOCKET: Final = "admin_socket"
"""A connection to the socket has this name in the state of its requests."""
LOCAL_ADMIN: Final = Caller("", "admin-socket", PREDICT | READ | METRICS | ADMIN | ANY_KEY)
"""The caller of every request that comes over the socket."""
_OWNER_ALONE: Final = 0o600


def open_admin_socket(path: Path) -> socket.socket:
    """A listening socket at `path`, which only this user can open.

    A socket that a dead server has left there is replaced. Raises ConfigError if the path cannot be used.
    """
    listener = listen_unix(path, _OWNER_ALONE, "--admin-socket")
    listener.setblocking(False)
    return listener
