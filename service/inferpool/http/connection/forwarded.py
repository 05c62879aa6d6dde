"""Requests that another process of the server has received, and passes on over a Unix socket.

Such a connection begins with one line of JSON, which says whose requests follow: the address of the client,
and what its certificate says (`CertificateCallers`), if it has shown one. The line is believed, because the
kernel says that the other process is of the same user.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

FORWARDED_FROM: Final = "forwarded_from"
"""The key in the state of a connection of the address of the client whose requests it carries."""
CLIENT_CERTIFICATE: Final = "client_certificate"
"""The key in the state of a connection of what the client's certificate says, None without one."""
TENANT: Final = b"inferpool-tenant"
"""The header by which the process that passes requests on is told whose they are, percent-encoded."""
MOST_LINE_BYTES: Final = 16 * 1024
_CREDENTIALS: Final = struct.Struct("=3i")
"""Process, user and group of the other end, as the kernel tells them."""


def introduce(client: str, certificate: dict[str, Any] | None) -> bytes:
    """Return the first line of a connection. Raises ValueError if it has no room for the certificate."""
    line = json.dumps({"client": client, "certificate": certificate}).encode() + b"\n"
    if len(line) > MOST_LINE_BYTES:
        raise ValueError(f"the names in the client's certificate have more than {MOST_LINE_BYTES} bytes")
    return line


class ForwardedProtocol(asyncio.Protocol):
    """Reads the first line of a connection, and gives the connection to the protocol that answers requests.

    Attributes:
        ended: what is called when the connection is lost.
    """

    def __init__(self, make_protocol: Callable[[dict[str, Any]], Any]) -> None:
        """`make_protocol` makes the protocol for a connection with the given state."""
        self.ended: Callable[[], None] | None = None
        self._make_protocol = make_protocol
        self._transport: Any = None
        self._line = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport of another process, unless it is another user's."""
        connection = transport.get_extra_info("socket")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(credentials)
        self._transport = transport
        if user != os.geteuid():
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Wait for the end of the line."""
        self._line += data
        line, end, rest = self._line.partition(b"\n")
        if not end:
            if len(self._line) > MOST_LINE_BYTES:
                self._transport.abort()
            return
        facts = json.loads(line)
        protocol = self._make_protocol(
            {FORWARDED_FROM: facts["client"], CLIENT_CERTIFICATE: facts["certificate"]}
        )
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        if rest:
            protocol.data_received(rest)
