"""How long a connection is kept whose client sends nothing, or next to nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.conftest import MakeChaos, Serve, chaos_in
from tests.server import Server, wait_until

pytestmark = pytest.mark.parametrize("server_module", ["tests.servers.short_timeouts"], indirect=True)

HEAD = b"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 17\r\n\r\n"


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    # Measured, the slow model would take half a minute to load.
    return module_serve(module_make_chaos("m", row=[1], run_ms=1500), "--measure-ms", "0")


def received_until_closed(server: Server, *sent: bytes) -> bytes:
    """Return what the server sends before it closes; the test times out if it never does."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        for data in sent:
            connection.sendall(data)
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    return received


@pytest.mark.parametrize("sent", [b"", b"POST /pre", HEAD, HEAD + b'{"inp', b"GET /models HTTP/1.1\r\nhost:"])
def test_a_client_that_stops_is_disconnected(server: Server, sent: bytes) -> None:
    assert received_until_closed(server, sent) == b""
    server.wait_for_metric("in_flight_requests", at_most=0)


def test_a_connection_is_kept_as_long_as_its_request_runs_and_then_for_a_while(server: Server) -> None:
    answer = received_until_closed(server, HEAD + b'{"inputs": [[1]]}')
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_body_after_a_refusal_does_not_keep_the_connection(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD.replace(b"/m ", b"/nobody "))
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(b'{"inputs": [[1]]}' + b"\r\n")
        assert connection.recv(65536) == b"", "closed like any idle connection"


def answer_to_drops(server: Server, sent: bytes, drops: Iterable[bytes]) -> bytes:
    """Send `sent`, then one of `drops` every tenth of a second; return all that the server sends."""
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
        # The same holds for later requests on a connection.
        (HEAD + b'{"inputs": [[1]]}') * 2 + HEAD.replace(b"17", b"1000"),
    ],
)
def test_a_body_sent_in_drops_is_refused(server: Server, sent: bytes) -> None:
    refused = server.metric("requests_total", model="m", code="408")
    _, *answers, last = answer_to_drops(server, sent, itertools.repeat(b" ")).split(b"HTTP/1.1 ")
    assert [answer[:3] for answer in answers] == [b"200"] * (sent.count(b"POST") - 1)
    head, _, body = last.partition(b"\r\n\r\n")
    assert head.startswith(b"408 ")
    assert b"\r\nconnection: close" in head
    assert json.loads(body)["code"] == "too_slow"
    assert server.metric("requests_total", model="m", code="408") == refused + 1
    server.wait_for_metric("in_flight_requests", at_most=0)


@pytest.mark.parametrize(
    ("sent", "drop"),
    [
        (b"POST /predict/m HTTP/1.1\r\nhost: x\r\nx-drops: ", b"x"),
        (b"GET /models HTTP/1.1\r\nhost: x\r\nx-drops: ", b"x"),
        (b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{", b" "),
    ],
)
def test_a_head_sent_in_drops_is_refused_and_so_is_the_body_of_any_route(
    server: Server, sent: bytes, drop: bytes
) -> None:
    assert answer_to_drops(server, sent, itertools.repeat(drop)).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        # Refused at once; the rest of the body gets no further response.
        HEAD.replace(b"/m ", b"/nobody ").replace(b"17", b"1000"),
    ],
)
def test_drops_between_requests_do_not_keep_a_connection(server: Server, sent: bytes) -> None:
    assert answer_to_drops(server, sent, itertools.repeat(b"\r\n")).count(b"HTTP/1.1") == bool(sent)


def test_a_long_body_may_take_as_long_as_it_keeps_arriving(server: Server) -> None:
    """It may take longer than a request that arrives in drops."""
    chunk, count = b" " * 65536, 20
    body = b'{"inputs": [[1]]}'
    head = HEAD.replace(b"17", b"%d" % (len(body) + len(chunk) * count))
    answer = answer_to_drops(server, head, itertools.chain(itertools.repeat(chunk, count), [body]))
    assert answer.startswith(b"HTTP/1.1 200")


def test_drops_behind_a_running_request_do_not_cost_it_its_response(server: Server) -> None:
    sent = HEAD + b'{"inputs": [[1]]}' + b"POST /predict/m HTTP/1.1\r\nx-drops: "
    answers = answer_to_drops(server, sent, itertools.repeat(b"x")).split(b"HTTP/1.1 ")
    assert [answer[:3] for answer in answers] == [b"", b"200", b"408"]


@pytest.fixture(scope="module")
def quick(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server without other clients: each test leaves it without connections."""
    return module_serve(chaos_in(tmp_path_factory.mktemp("quick"))("m"))


def sockets(server: Server) -> int:
    """Return how many sockets the process that reads requests has open."""
    count = 0
    for file in Path(f"/proc/{server.web_process()}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(file.readlink()).startswith("socket:")
    return count


@pytest.mark.parametrize("path", ["/docs/files/swagger-ui-bundle.js", "/openapi.json"])
def test_a_client_that_does_not_read_a_response_of_the_application_is_disconnected(
    quick: Server, path: str
) -> None:
    server = quick
    count = sockets(server)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() * 100)
        assert connection.recv(9) == b"HTTP/1.1 "
        assert sockets(server) > count
        wait_until(lambda: sockets(server) <= count, "the connection is closed")


def test_a_client_that_leaves_the_end_of_a_last_response_unread_is_disconnected(quick: Server) -> None:
    """How much the kernel takes is not known, so the connections differ in how much they leave unread.

    Some of them then leave a small rest to the server.
    """
    server = quick
    size = len(server.get("/openapi.json").content)
    count = sockets(server)
    with contextlib.ExitStack() as stack:
        for unread in range(1_000_000, 2_800_000, 50_000):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            connection.connect(("127.0.0.1", server.port))
            requests = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * (unread // size)
            connection.sendall(requests + b"no request\r\n\r\n")
        wait_until(lambda: sockets(server) > count, "the connections are open")
        wait_until(lambda: sockets(server) <= count, "the connections are closed")
