"""What the timer of one connection does, with a loop whose time stands still."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

from inferpool.http.connection.slow_client import SlowClientTimer

from tests.http.connection.fakes import FakeLoop

KEEP_ALIVE_S = 75.0


class Transport:
    """The transport of a connection that answers nothing."""

    closed = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0


def test_a_request_that_nobody_has_read_yet_keeps_its_connection() -> None:
    """The event loop looks at timers before it reads, so after a busy moment the request is late for both."""
    server_side, client_side = socket.socketpair()
    with server_side, client_side:
        loop, transport = FakeLoop(), Transport()
        connection: Any = SimpleNamespace(
            loop=loop,
            transport=transport,
            descriptor=server_side.fileno(),
            reading_ended=False,
            between_requests=True,
            current=None,
            idle_since=loop.now,
            is_read_paused=lambda: False,
        )
        SlowClientTimer(connection, KEEP_ALIVE_S, lambda: None).start()
        client_side.sendall(b"POST /predict/m HTTP/1.1\r\nhost: x\r\n")
        loop.advance(KEEP_ALIVE_S + 1)
        assert not transport.closed
        server_side.recv(100)
        loop.advance(1)
        assert transport.closed
