"""How long a connection is kept on which nothing comes, or next to nothing: between and within requests."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.conftest import MakeChaos, Serve
from tests.server import Server, wait_until

pytestmark = pytest.mark.parametrize("server_module", ["tests.servers.short_timeouts"], indirect=True)

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


def answer_to_drops(server: Server, sent: bytes, drops: Iterable[bytes]) -> bytes:
    """All that comes back where `drops` follow what is sent, one every tenth of a second."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(sent)
        connection.settimeout(0.1)
        for drop in itertools.chain(drops, itertools.repeat(b"")):
            try:
                data = connection.recv(65536)
                if not data:
                    break
                received += data
            except TimeoutError:
                connection.sendall(drop)
            except ConnectionError:
                break
    return received


@pytest.mark.parametrize(
    "sent",
    [
        HEAD.replace(b"17", b"1000") + b'{"inputs": [[1]]',
        b"POST /predict/m HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3e8\r\n",
        # The next ones on a connection are held to the same, each in its turn.
        (HEAD + b'{"inputs": [[1]]}') * 2 + HEAD.replace(b"17", b"1000"),
    ],
)
def test_a_body_that_comes_in_drops_is_refused(server: Server, sent: bytes) -> None:
    _, *answers, last = answer_to_drops(server, sent, itertools.repeat(b" ")).split(b"HTTP/1.1 ")
    assert [answer[:3] for answer in answers] == [b"200"] * (sent.count(b"POST") - 1)
    head, _, body = last.partition(b"\r\n\r\n")
    assert head.startswith(b"408 ")
    assert b"\r\nconnection: close" in head
    assert json.loads(body)["code"] == "too_slow"
    assert server.metric("requests_total", model="m", code="408") == 1
    assert server.metric("in_flight_requests") == 0


@pytest.mark.parametrize(
    ("sent", "drop"),
    [
        (b"POST /predict/m HTTP/1.1\r\nhost: x\r\nx-drops: ", b"x"),
        (b"GET /models HTTP/1.1\r\nhost: x\r\nx-drops: ", b"x"),
        (b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{", b" "),
    ],
)
def test_a_head_that_comes_in_drops_is_refused_and_so_is_the_body_of_any_route(
    server: Server, sent: bytes, drop: bytes
) -> None:
    assert answer_to_drops(server, sent, itertools.repeat(drop)).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        # Refused at once, and nothing more is said of what follows.
        HEAD.replace(b"/m ", b"/nobody ").replace(b"17", b"1000"),
    ],
)
def test_drops_that_nobody_waits_for_do_not_keep_a_connection(server: Server, sent: bytes) -> None:
    assert answer_to_drops(server, sent, itertools.repeat(b"\r\n")).count(b"HTTP/1.1") == bool(sent)


def test_a_long_body_may_take_as_long_as_it_keeps_coming(server: Server) -> None:
    """For longer than a request of which little comes."""
    piece, count = b" " * 65536, 20
    body = b'{"inputs": [[1]]}'
    head = HEAD.replace(b"17", b"%d" % (len(body) + len(piece) * count))
    answer = answer_to_drops(server, head, itertools.chain(itertools.repeat(piece, count), [body]))
    assert answer.startswith(b"HTTP/1.1 200")


def test_who_stands_in_drops_behind_a_request_that_runs_does_not_cost_it_its_answer(server: Server) -> None:
    sent = HEAD + b'{"inputs": [[1]]}' + b"POST /predict/m HTTP/1.1\r\nx-drops: "
    answers = answer_to_drops(server, sent, itertools.repeat(b"x")).split(b"HTTP/1.1 ")
    assert [answer[:3] for answer in answers] == [b"", b"200", b"408"]


def sockets(server: Server) -> int:
    """How many the server has open."""
    count = 0
    for file in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(file.readlink()).startswith("socket:")
    return count


@pytest.mark.parametrize("path", ["/docs/files/swagger-ui-bundle.js", "/openapi.json"])
def test_who_does_not_read_what_the_application_answers_is_hung_up_on(server: Server, path: str) -> None:
    count = sockets(server)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() * 100)
        assert connection.recv(9) == b"HTTP/1.1 "
        assert sockets(server) > count
        wait_until(lambda: sockets(server) <= count, "the connection is closed")
