"""How long a connection is kept on which nothing comes: between requests, and within one."""

from __future__ import annotations

import socket

import pytest

from tests.conftest import MakeChaos, Serve
from tests.server import Server

pytestmark = pytest.mark.parametrize("lane", ["tests.impatient"], indirect=True)

HEAD = b"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 17\r\n\r\n"


@pytest.fixture
def server(serve: Serve, make_chaos: MakeChaos) -> Server:
    return serve(make_chaos("m", row=[1], run_ms=1500))


def hung_up(server: Server, *sent: bytes) -> bytes:
    """What comes back before the server hangs up; the test times out if it never does."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        for piece in sent:
            connection.sendall(piece)
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    return received


@pytest.mark.parametrize("sent", [b"", b"POST /pre", HEAD, HEAD + b'{"inp', b"GET /models HTTP/1.1\r\nhost:"])
def test_who_stands_still_is_hung_up_on(server: Server, sent: bytes) -> None:
    assert hung_up(server, sent) == b""
    assert server.metric("in_flight_requests") == 0


def test_a_connection_is_kept_as_long_as_its_request_runs_and_then_for_a_while(server: Server) -> None:
    answer = hung_up(server, HEAD + b'{"inputs": [[1]]}')
    assert answer.startswith(b"HTTP/1.1 200")


def test_what_follows_a_refusal_does_not_keep_the_connection(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD.replace(b"/m ", b"/nobody "))
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(b'{"inputs": [[1]]}' + b"\r\n")
        assert connection.recv(65536) == b"", "hung up, like any connection on which nothing comes"
