"""The socket that a server listens on: TCP on IPv4, IPv6 or both, or a Unix socket."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
from pathlib import Path
from typing import Any, Final

from inferpool.errors import ConfigError

BACKLOG: Final = 4096
"""Connections that the kernel may hold until the server accepts them."""
_ALL_IPV6: Final = "::"
_ALL_IPV4: Final = "0.0.0.0"


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening TCP socket; port 0 takes a free port. Raises ConfigError if the address cannot be bound.

    The error names the `flag` that chooses another port.

    The host `::` takes IPv4 as well as IPv6. If the machine has no IPv6, the socket is one of IPv4 alone.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if host == _ALL_IPV6 and not _has_ipv6():
        host, family = _ALL_IPV4, socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == _ALL_IPV6
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        remedy = f"--host and {flag} choose another address"
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; {remedy}") from error


def listen_unix(path: Path, mode: int, flag: str = "--unix-socket") -> socket.socket:
    """A listening Unix socket, whose file has the permissions `mode`.

    A file that a server has left behind is replaced. Raises ConfigError, which names the `flag` that chooses
    another path, if the file is anything else, or if a server listens there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        # Until the mode is set, nobody else may connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"cannot listen on {path}: {reason}; {flag} names a file in a folder that this user can write"
        ) from error
    except ConfigError:
        listener.close()
        raise
    return listener


def listen_internally() -> socket.socket:
    """A listening Unix socket between processes of one server. It has no file: its name is an abstract one.

    The name can be found out, so whoever accepts a connection asks the kernel whose it is.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0inferpool-{secrets.token_hex(16)}")
    listener.listen(BACKLOG)
    return listener


def socket_file(listener: socket.socket) -> str | None:
    """The path of a Unix socket; None for TCP."""
    return str(listener.getsockname()) if listener.family == socket.AF_UNIX else None


def remove_socket_file(path: str | None) -> None:
    """Remove the file of a Unix socket that is closed, unless another server listens there by now."""
    if path is not None and not _is_served(path):
        with contextlib.suppress(OSError):
            Path(path).unlink()


def address_of(listener: socket.socket, *, tls: bool) -> str:
    """The address to ask: a URL, or for a Unix socket `unix:` and its path."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def client_address(peer: Any) -> str:
    """The address of a client, of what the system calls its peer; "" for a Unix socket.

    A socket of IPv6 and IPv4 shows clients of IPv4 as `::ffff:192.0.2.1`.
    """
    if not isinstance(peer, tuple):
        return ""
    address = str(peer[0])
    return address.removeprefix("::ffff:") if "." in address else address


def _has_ipv6() -> bool:
    """Whether sockets of IPv6 can be bound here: a kernel or a container may be without."""
    if not socket.has_dualstack_ipv6():
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind((_ALL_IPV6, 0))
    except OSError:
        return False
    return True


def _remove_stale(path: Path) -> None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConfigError(f"cannot listen on {path}: the file exists and is no socket; remove it")
    if _is_served(str(path)):
        raise ConfigError(f"cannot listen on {path}: another server listens there; stop it first")
    path.unlink()


def _is_served(path: str) -> bool:
    """Whether a process listens on the Unix socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False
        return True
