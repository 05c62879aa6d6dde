"""A Unix socket whose requests need no key: only the user of the server can open it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from inferpool.errors import ConfigError
from inferpool.http.access.caller import ADMIN, ANY_KEY, METRICS, PREDICT, READ, Caller

ADMIN_SOCKET: Final = "admin_socket"
"""A connection to the socket has this name in the state of its requests."""
LOCAL_ADMIN: Final = Caller("", "admin-socket", PREDICT | READ | METRICS | ADMIN | ANY_KEY)
"""The caller of every request that comes over the socket."""
_BACKLOG: Final = 16


def open_admin_socket(path: Path) -> socket.socket:
    """A listening socket at `path`, which only this user can open.

    A socket that a dead server has left there is replaced. Raises ConfigError if the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_left(path)
        # The mask counts before anybody can connect; a mode that is set later would be too late.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {path}: {reason}; --admin-socket names another path") from error
    except ConfigError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _remove_left(path: Path) -> None:
    """Remove a socket on which nobody listens. Raises ConfigError for anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is no socket; --admin-socket names another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionError):
        probe.connect(str(path))
        raise ConfigError(f"another server listens on {path}; --admin-socket names another path")
    path.unlink()
