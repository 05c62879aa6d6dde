"""A head that was parsed before is found by its bytes; every other head goes to the parser."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import Unauthorized
from inferpool.http.access.caller import EVERYONE
from inferpool.http.connection.head_cache import MOST_HEAD_BYTES, MOST_HEADS, HeadCache
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.request_head import RequestHead
from inferpool.observe.build_info import hot_path

from tests.conftest import MakeChaos, Serve
from tests.server import Server

BODY = b'{"inputs": [[1]]}'


def request(body: bytes = BODY, *fields: str, path: str = "/predict/m") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


def head(length: int = len(BODY), *headers: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead("m", None, [(b"content-length", b"%d" % length), *headers])


def test_a_cached_head_is_found_with_any_body_of_its_length() -> None:
    heads = HeadCache()
    heads.remember(request(), BODY, NATIVE_API, head(), EVERYONE)
    found = heads.find(request(b'{"inputs": [[2]]}'))
    assert found is not None
    assert (found[0].api, found[1]) == (NATIVE_API, b'{"inputs": [[2]]}')
    assert heads.find(request() + b"P") is None, "the next request has begun"
    assert heads.find(request()[:-1]) is None, "the body is not all there"
    assert heads.find(request(path="/predict/n")) is None
    assert heads.find(b"\r\n" + request()) is None


def test_a_head_that_comes_again_is_not_mistaken_for_another() -> None:
    heads = HeadCache()
    longer = b'{"inputs": [[1, 2]]}'
    for body in (BODY, longer):
        heads.remember(request(body), body, NATIVE_API, head(len(body)), EVERYONE)
    for body in (BODY, BODY, longer, longer, BODY):
        found = heads.find(request(body))
        assert found is not None
        assert (found[0].body_bytes, found[1]) == (len(body), body)
        assert heads.find(request(body) + b"P") is None
        assert heads.find(request(body)[:-1]) is None
    assert heads.find(request().replace(b"\r\n\r\n", b"\r\nx-timeout-ms: 1\r\n\r\n")) is None
    heads.clear()
    assert heads.find(request()) is None


def test_a_head_that_is_found_while_heads_are_forgotten_is_not_found_again() -> None:
    if hot_path() == "compiled":
        pytest.skip("compiled code calls no method of a part of bytes")
    heads = HeadCache()

    class Clearing(bytes):
        """A request during whose search another thread forgets all heads."""

        def __getitem__(self, part: Any) -> Any:
            if part.start is not None:
                heads.clear()
            return bytes(self)[part]

    heads.remember(request(), BODY, NATIVE_API, head(), EVERYONE)
    assert heads.find(Clearing(request())) is not None
    assert heads.find(request()) is None


def test_a_refused_head_is_found_until_the_keys_change_and_takes_no_place_of_others() -> None:
    heads = HeadCache()
    error = Unauthorized("the server does not know this key", reason="unknown")
    heads.remember(request(), BODY, NATIVE_API, head(), EVERYONE)
    for number in range(2 * MOST_HEADS):
        heads.remember_refused(request(BODY, f"x-api-key: {number}"), BODY, NATIVE_API, head(), error)
    last = request(BODY, f"x-api-key: {2 * MOST_HEADS - 1}")
    found = heads.find_refused(last)
    assert found is not None
    assert (found[0].error, found[1], heads.find(last)) == (error, None, None)
    found = heads.find_refused(request(BODY, "x-api-key: another"))
    assert found is not None
    assert (found[0].error, found[1]) == (error, b"another")
    for field in (
        "x-api-key: a b",
        "x-api-key:",
        "x-api-keys: a",
        "authorization: Bearer a",
        "x-api-key: a\tb",
    ):
        assert heads.find_refused(request(BODY, field)) is None, "the parser reads this head"
    assert heads.find(request()) is not None
    assert heads.find_refused(request()) is heads.find_refused(last[:-1]) is None
    assert heads.find_refused(last + b"P") is None
    heads.clear()
    assert heads.find_refused(last) is None


def test_a_cached_head_is_found_with_bodies_of_other_lengths() -> None:
    heads = HeadCache()
    learned = RequestHead(
        "m", "2", [(b"content-length", b"17"), (b"x-timeout-ms", b"5"), (b"accept", b"a/b")]
    )
    heads.remember(request(BODY, "x-timeout-ms: 5", "accept: a/b"), BODY, NATIVE_API, learned, EVERYONE)
    for body in (b"", b"1", BODY, BODY * 1000):
        found = heads.find(request(body, "x-timeout-ms: 5", "accept: a/b"))
        assert found is not None
        known, rest = found
        assert (rest, known.body_bytes, known.head.content_length) == (body, len(body), len(body))
        assert (known.head.model, known.head.version) == ("m", "2")
        assert (known.head.timeout_text, known.head.accept) == (b"5", "a/b")
        assert heads.find(request(body, "accept: a/b")) is None
        assert heads.find(request(body, "x-timeout-ms: 5", "accept: a/b")[:-1]) is None
    for length in ("", "+1", "-1", "1_0", "1 ", " 1", "0x1", "1" * 10):
        lines = ["POST /predict/m HTTP/1.1", "host: x", f"content-length: {length}", "x-timeout-ms: 5"]
        data = "\r\n".join([*lines, "accept: a/b", "", "1"]).encode()
        assert heads.find(data) is None, length


@pytest.mark.parametrize(
    ("data", "body", "learned"),
    [
        (request(), BODY, head(length=3)),
        (request(), BODY, RequestHead("m", None, [])),
        (request(), BODY, head(len(BODY), (b"x-request-id", b"mine"))),
        (request(), BODY, head(len(BODY), (b"traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"))),
        (request(), BODY, head(len(BODY), (b"inference-header-content-length", b"5"))),
        (request() + b"\r\n", BODY, head()),
        # As if the parser had taken the head to end elsewhere than at the first empty line.
        (b"POST / HTTP/1.1\n\n" + BODY, BODY, head()),
        (request(b"\r\n\r\n{}"), b"\r\n\r\n{}"[4:], head(2)),
        (request(BODY, "x: " + "y" * MOST_HEAD_BYTES), BODY, head()),
    ],
    ids=["length", "no length", "id", "trace", "binary", "more", "bare line feeds", "elsewhere", "long"],
)
def test_a_head_that_may_mean_something_else_next_time_is_not_cached(
    data: bytes, body: bytes, learned: RequestHead
) -> None:
    heads = HeadCache()
    heads.remember(data, body, NATIVE_API, learned, EVERYONE)
    assert heads.find(data) is None


def test_the_number_of_cached_heads_is_bounded() -> None:
    heads = HeadCache()
    for number in range(3 * MOST_HEADS):
        data = request(BODY, f"x: {number}")
        heads.remember(data, BODY, NATIVE_API, head(), EVERYONE)
        assert heads.find(data) is not None
    kept = sum(heads.find(request(BODY, f"x: {number}")) is not None for number in range(3 * MOST_HEADS))
    assert 1 <= kept <= MOST_HEADS


@given(st.binary(max_size=200))
def test_any_bytes_may_be_looked_up(data: bytes) -> None:
    heads = HeadCache()
    heads.remember(request(), BODY, NATIVE_API, head(), EVERYONE)
    assert heads.find(data) is None


def received(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the connection was closed before the response"
    return data


def read_answers(connection: socket.socket, count: int) -> list[tuple[int, dict[str, str], object]]:
    answers: list[tuple[int, dict[str, str], object]] = []
    data = b""
    while len(answers) < count:
        while b"\r\n\r\n" not in data:
            data += received(connection)
        top, _, data = data.partition(b"\r\n\r\n")
        lines = top.decode().split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:])
        while len(data) < int(fields["content-length"]):
            data += received(connection)
        body, data = data[: int(fields["content-length"])], data[int(fields["content-length"]) :]
        answers.append((int(lines[0].split()[1]), fields, json.loads(body)))
    return answers


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    config = "[instances]\ncount = 1\n[batching]\nmax_rows = 1\n[queue]\nmax_rows = 1\n"
    module_make_chaos("one-by-one", config, row=[1], run_ms=300)
    module_make_chaos("slow", row=[1], run_ms=600)
    return module_serve(module_make_chaos("m", row=[1]), "--measure-ms", "0")


def test_the_same_head_again_and_again_answers_as_the_first_time(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        seen = []
        for value in (1, 2, 3):
            connection.sendall(request(b'{"inputs": [[%d]]}' % value))
            seen += read_answers(connection, 1)
        ids = {fields["x-request-id"] for _, fields, _ in seen}
        assert [status for status, _, _ in seen] == [200] * 3
        assert len(ids) == 3
        first, second, third = (answer["outputs"] for _, _, answer in seen)  # type: ignore[index]
        assert first != second != third

        # The same head with a body that is wrong, in two pieces, and twice at once.
        connection.sendall(request(b'{"inputs": [[x]]}'))
        assert read_answers(connection, 1)[0][0] == 400
        whole = request()
        connection.sendall(whole[:-5])
        connection.sendall(whole[-5:])
        assert read_answers(connection, 1)[0][2]["outputs"] == first  # type: ignore[index]
        connection.sendall(whole + whole + whole)
        assert [answer["outputs"] for _, _, answer in read_answers(connection, 3)] == [first] * 3  # type: ignore[index]


def test_a_request_without_a_cached_head_follows_on_the_same_connection(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        for _ in range(2):
            connection.sendall(request())
            assert read_answers(connection, 1)[0][0] == 200
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_answers(connection, 1)[0][0] == 200
        connection.sendall(request(BODY, "x-request-id: mine"))
        assert read_answers(connection, 1)[0][1]["x-request-id"] == "mine"
        connection.sendall(request(BODY, "connection: close"))
        assert read_answers(connection, 1)[0][1]["connection"] == "close"
        assert connection.recv(1) == b""


def test_known_heads_on_one_connection_are_answered_in_their_order(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request(path="/predict/slow"))
        read_answers(connection, 1)
        # Each in a segment of its own, while the one before it runs.
        for value in range(3):
            connection.sendall(request(b'{"inputs": [[%d]]}' % value, path="/predict/slow"))
            if value == 0:
                wait_until_running(server)
        sums = [answer["outputs"]["sum"] for _, _, answer in read_answers(connection, 3)]  # type: ignore[index]
        assert sums == [[3 * value + 1] for value in range(3)]


@pytest.mark.parametrize("line", [b"connection: close", b"expect: 100-continue"])
def test_what_a_head_asks_of_its_connection_is_done_each_time(server: Server, line: bytes) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request(BODY, line.decode()))
            if line.startswith(b"expect"):
                continued = b""
                while not continued.endswith(b"\r\n\r\n"):
                    continued += connection.recv(1)
                assert continued.startswith(b"HTTP/1.1 100")
            assert read_answers(connection, 1)[0][0] == 200
            if line == b"connection: close":
                assert connection.recv(1) == b""


def test_connections_of_http_1_0_are_closed_each_time(server: Server) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request().replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            assert read_answers(connection, 1)[0][0] == 200
            assert connection.recv(1) == b""


def test_a_request_with_a_cached_head_is_admitted_like_any_other(server: Server) -> None:
    """The last test of this server."""
    sent = request(path="/predict/one-by-one")
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(6)
        ]
        connections[0].sendall(sent)
        assert read_answers(connections[0], 1)[0][0] == 200
        for connection in connections:
            connection.sendall(sent)
        statuses = sorted(read_answers(connection, 1)[0][0] for connection in connections)
        assert set(statuses) == {200, 429}
        assert statuses.count(429) >= 4, "one runs, one waits"
        connections[0].sendall(sent)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        # The line comes first: by the answer to this the loop has had its turn.
        connections[2].sendall(b"GET /health/live HTTP/1.1\r\nhost: here\r\n\r\n")
        assert read_answers(connections[2], 1)[0][0] == 200
        connections[1].sendall(sent)
        assert read_answers(connections[1], 1)[0][0] == 503
        assert read_answers(connections[0], 1)[0][0] == 200


def wait_until_running(server: Server) -> None:
    server.wait_for_metric("in_flight_requests", 1)
