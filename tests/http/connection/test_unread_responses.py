"""Clients that leave large responses unread do not keep others from theirs."""

from __future__ import annotations

import socket
import time

import pytest

from tests.conftest import MakeChaos, Serve
from tests.http.connection.test_pipelining import Wire
from tests.server import Server, wait_until

IN_FLIGHT_BYTES = 32 * 2**20
ROWS = 200_000
"""Rows of the model "m" whose answer takes about 5 MB: their sums."""


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    return module_serve(module_make_chaos("m", row=[1]), "--in-flight-bytes", str(IN_FLIGHT_BYTES))


class Deaf(Wire):
    """A client that does not read, at an address of its own."""

    def __init__(self, server: Server, address: str) -> None:
        self.server = server
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.bind((address, 0))
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", server.port))
        self.stream = self.socket.makefile("rb")


def large() -> bytes:
    body = b'{"inputs": [' + b",".join([b"[0.1]"] * ROWS) + b"]}"
    return b"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def small() -> str:
    body = '{"inputs": [[1]]}'
    return f"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}"


def test_clients_that_do_not_read_cost_others_no_answer_and_are_disconnected_when_memory_is_short(
    server: Server,
) -> None:
    deaf = [Deaf(server, f"127.0.0.{number}") for number in range(2, 8)]
    for wire in deaf:
        wire.send(large())
    with Wire(server) as other:
        for _ in range(20):
            other.send(small())
            assert other.answer()[0] == 200
            time.sleep(0.02)

        def is_answered() -> bool:
            other.send(large())
            status, _, body = other.answer()
            assert status in (200, 503), body
            return status == 200

        wait_until(is_answered, "a large answer finds room again", 15)
    for wire in deaf:
        wire.close()
    server.wait_for_metric("in_flight_requests", at_most=0)
    with Wire(server) as other:
        other.send(large())
        assert other.answer()[0] == 200


def test_the_answers_to_one_client_leave_room_for_those_to_others(server: Server) -> None:
    deaf = [Deaf(server, "127.0.0.2") for _ in range(5)]
    for wire in deaf:
        wire.send(large())
    with Wire(server) as other:
        other.send(large())
        assert other.answer()[0] == 200
    refused = 0
    for wire in deaf:
        head = wire.stream.readline()
        refused += head.startswith(b"HTTP/1.1 503")
        wire.close()
    assert refused
