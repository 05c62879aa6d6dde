"""Clients do all kinds of things with their connections: pipelining, chunks, expectations, disconnecting."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from inferpool.http.connection.shared import MOST_HEAD_BYTES

from tests.chaos import inferpool_chaos as chaos
from tests.conftest import MakeChaos, Serve
from tests.server import Server

HANGS_S = 60
"""Only a server that hangs takes so long, even on a busy machine; an idle connection is kept for longer."""
LIVE = "GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


class Wire:
    """A bare connection."""

    def __init__(self, server: Server, tls: ssl.SSLContext | None = None) -> None:
        self.server = server
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=HANGS_S)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self.stream = self.socket.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection: the kernel keeps it open while the stream is."""
        self.stream.close()
        self.socket.close()

    def send(self, text: str | bytes) -> None:
        self.socket.sendall(text.encode() if isinstance(text, str) else text)

    def status(self) -> tuple[int, dict[str, str]]:
        line = self.stream.readline().decode()
        assert line, "the connection was closed"
        headers = {}
        while (header := self.stream.readline().decode().strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        return int(line.split()[1]), headers

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = self.status()
        return status, headers, self.stream.read(int(headers.get("content-length", "0")))

    def ended(self) -> bool:
        return self.stream.read(1) == b""


def check_host_is_required(connection: socket.socket) -> None:
    """Send a request without `Host` on an open connection; the response is 400 and names what to send."""
    connection.settimeout(HANGS_S)
    connection.sendall(LIVE.encode() + LIVE.replace("host: x\r\n", "").encode() + LIVE.encode())
    with connection.makefile("rb") as stream:
        answers = stream.read()
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answers) == [b"200", b"400"]
    assert b"Host" in answers


def request(*marks: float, path: str = "/predict/m", version: str = "1.1", headers: str = "") -> str:
    body = json.dumps({"inputs": [[mark, 0, 0, 0] for mark in marks]})
    return f"POST {path} HTTP/{version}\r\nhost: x\r\ncontent-length: {len(body)}\r\n{headers}\r\n{body}"


def chunked(codings: str, path: str = "/predict/m") -> str:
    """A request whose body has these transfer codings, or says so."""
    body = request(1).partition("\r\n\r\n")[2]
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: {codings}"
    return f"{head}\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n"


def sums(*marks: float) -> list[float]:
    rows = np.zeros((len(marks), 4))
    rows[:, 0] = marks
    return chaos.expected(rows).tolist()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the model `stuck` wait for it if their row says so."""
    gate = tmp_path_factory.mktemp("gate") / "gate"
    os.mkfifo(gate)
    return gate


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos, gate: Path) -> Server:
    module_make_chaos("slow", run_ms=200)
    module_make_chaos("stuck", run_gate=str(gate), config="[batching]\nenabled = false")
    return module_serve(module_make_chaos("m", run_ms=1), "--max-body-bytes", "100000")


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server) as made:
        yield made


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    paths = ["/predict/m", "/health/live", "/predict/m", "/predict/nobody", "/models", "/v2/models/m/infer"]
    text = ""
    for number, path in enumerate(paths * 3):
        if path.startswith("/predict"):
            text += request(number, path=path)
        elif path.startswith("/v2"):
            data = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [number, 0, 0, 0]}
            sent = json.dumps({"inputs": [data]})
            text += f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(sent)}\r\n\r\n{sent}"
        else:
            text += f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"
    wire.send(text)
    for number, path in enumerate(paths * 3):
        status, _, body = wire.answer()
        assert status == (404 if path.endswith("nobody") else 200), path
        if path == "/predict/m":
            assert json.loads(body)["outputs"]["sum"] == sums(number)
        elif path.startswith("/v2"):
            assert json.loads(body)["outputs"][0]["data"] == sums(number)


def test_requests_that_ask_to_upgrade_have_their_turns_as_all_others(wire: Wire) -> None:
    plain = "GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    upgrade = "connection: keep-alive, upgrade\r\nupgrade: websocket\r\n"
    models = f"GET /models HTTP/1.1\r\nhost: x\r\n{upgrade}\r\n"
    predictions = "".join(request(mark, headers=upgrade if mark % 2 else "") for mark in range(5))
    wire.send(2 * plain + models + predictions + models)
    answers = [wire.answer() for _ in range(9)]
    assert [status for status, _, _ in answers] == 9 * [200]
    assert [headers.get("connection") for _, headers, _ in answers] == 9 * [None]
    for mark in range(5):
        assert json.loads(answers[3 + mark][2])["outputs"]["sum"] == sums(mark)
    wire.send(request(7))
    assert wire.answer()[0] == 200


def test_a_client_that_asks_for_a_tunnel_gets_none(wire: Wire) -> None:
    wire.send("CONNECT host:443 HTTP/1.1\r\nhost: x\r\n\r\n" + request(1))
    assert wire.answer()[0] == 400
    assert wire.ended()


FAULTS = {
    "method": ("nonsense\r\n\r\n", 400, "malformed_request"),
    "version": ("GET / HTTP/9.9\r\n\r\n", 400, "malformed_request"),
    "header": (
        "POST /predict/m HTTP/1.1\r\nhost: x\r\nx-request-id: mine\r\nno colon\r\n\r\n",
        400,
        "malformed_request",
    ),
    "space": (
        "POST /predict/m HTTP/1.1\r\nhost: x\r\nX-Request-Id: mine\r\na : b\r\n\r\n",
        400,
        "malformed_request",
    ),
    "length": (
        "POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        400,
        "malformed_request",
    ),
    "smuggled": (
        chunked("chunked").replace("transfer", "content-length: 5\r\ntransfer"),
        400,
        "malformed_request",
    ),
    "no host": (request(1).replace("host: x\r\n", "x-request-id: mine\r\n"), 400, "malformed_request"),
    "no host, not a prediction": (LIVE.replace("host: x\r\n", ""), 400, "malformed_request"),
    "two hosts": (request(1, headers="Host: x\r\n"), 400, "malformed_request"),
    "invalid host": (LIVE.replace("host: x", "host: a b"), 400, "malformed_request"),
    "coding": (chunked("gzip, chunked"), 501, "unsupported_transfer_coding"),
    "coding, not a prediction": (
        chunked("gzip, chunked", "/models").replace("\r\nhost", "\r\nx-request-id: mine\r\nhost"),
        501,
        "unsupported_transfer_coding",
    ),
    "chunked twice": (chunked("chunked, chunked"), 400, "malformed_request"),
    "chunked before another": (chunked("chunked, gzip"), 400, "malformed_request"),
    "no chunked": (chunked("gzip"), 400, "malformed_request"),
    "chunked of HTTP/1.0": (chunked("chunked").replace("1.1", "1.0"), 400, "malformed_request"),
    "HTTP/2.0": (request(1, version="2.0"), 400, "malformed_request"),
    "large": (f"GET /models HTTP/1.1\r\nhost: x\r\nx: {'y' * 70_000}\r\n\r\n", 431, "head_too_large"),
    "many": ("GET /models HTTP/1.1\r\nhost: x\r\n" + "a: b\r\n" * 12_000 + "\r\n", 431, "head_too_large"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("before", ["predict", "application", "both"])
def test_what_is_no_request_is_answered_after_the_answers_that_are_owed_before_it(
    wire: Wire, fault: str, before: str
) -> None:
    sent, status, code = FAULTS[fault]
    owed = {"predict": [request(1)] * 2, "application": [LIVE] * 2, "both": [request(1), LIVE, request(1)]}
    wire.send("".join(owed[before]) + sent + request(2))
    for _ in owed[before]:
        assert wire.answer()[0] == 200
    got, headers, body = wire.answer()
    problem = json.loads(body)
    assert (got, problem["code"], problem["status"]) == (status, code, status)
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == problem["request_id"]
    assert headers["connection"] == "close"
    assert (problem["request_id"] == "mine") is ("mine" in sent)
    assert wire.ended(), "what follows is not read"


def test_a_malformed_request_to_v2_gets_an_error_of_v2(wire: Wire) -> None:
    wire.send("POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n")
    status, headers, body = wire.answer()
    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(body).keys() == {"error", "code"}


def test_a_chunk_that_is_none_is_an_error_of_its_request_alone(wire: Wire) -> None:
    head = "POST {} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n"
    for path, id in (("/predict/m", "malformed_request"), ("/v2/repository/index", "malformed_request")):
        with Wire(wire.server) as other:
            other.send(request(1) + LIVE + request(2) + head.format(path) + '{"inpXX\r\n')
            assert [other.answer()[0] for _ in range(3)] == [200] * 3
            status, _, body = other.answer()
            assert (status, json.loads(body)["code"]) == (400, id)
            assert other.ended()


@pytest.mark.parametrize("piece", [1000, 8192, 30_000, 10**6])
def test_the_limit_of_a_head_is_the_same_however_it_is_cut_into_pieces(wire: Wire, piece: int) -> None:
    line = "GET /health/live HTTP/1.1\r\nhost: x\r\n"
    for extra, status in ((0, 200), (1, 431)):
        left = MOST_HEAD_BYTES - len(line) - len("\r\n") + extra
        headers = "x: " + "y" * (left - 5) + "\r\n"
        sent = line + headers + "\r\n"
        assert len(sent) == MOST_HEAD_BYTES + extra
        with Wire(wire.server) as other:
            for start in range(0, len(sent), piece):
                other.send(sent[start : start + piece])
                time.sleep(0.002)
            assert other.answer()[0] == status


def test_a_client_that_ends_its_side_gets_its_answers(server: Server) -> None:
    first, second, third = (request(mark, path="/predict/slow") for mark in (1, 2, 3))
    whole = first + LIVE + second
    for sent, count in ((first, 1), (whole, 3), (whole + third[:-5], 3), (whole + "POST /pre", 3)):
        with Wire(server) as wire:
            wire.send(sent)
            wire.socket.shutdown(socket.SHUT_WR)
            statuses: list[int] = []
            while len(statuses) < count:
                status, headers = wire.status()
                if status != 100:
                    wire.stream.read(int(headers["content-length"]))
                    statuses.append(status)
            assert statuses == [200] * count
            assert headers["connection"] == "close"
            assert wire.ended()
    server.wait_for_metric("in_flight_requests", at_most=0)


def test_a_client_that_is_gone_is_noticed_though_it_might_only_have_ended_its_side(
    server: Server, gate: Path
) -> None:
    with Wire(server) as first, Wire(server) as second:
        first.send(request(chaos.WAIT, path="/predict/stuck"))
        server.wait_for_metric("in_flight_requests", at_least=1)
        second.send(request(2, path="/predict/stuck"))
        server.wait_for_metric("in_flight_requests", at_least=2)
    # The run of the first request has not ended.
    server.wait_for_metric("in_flight_requests", at_most=0)
    chaos.open_gate(gate)


@pytest.mark.parametrize("path", ["/predict/nobody", "/predict/m"])
@pytest.mark.parametrize("chunked", [False, True])
def test_no_more_of_a_refused_body_is_read_than_is_needed(server: Server, path: str, chunked: bool) -> None:
    size = 64 * 2**20
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\n"
    head += "transfer-encoding: chunked\r\n\r\n4000000\r\n" if chunked else f"content-length: {size}\r\n\r\n"
    sent = 0
    with Wire(server) as wire:
        wire.send(head)
        wire.socket.settimeout(10)
        with contextlib.suppress(OSError):
            while sent < size:
                sent += wire.socket.send(b" " * 65536)
    assert sent < size // 2


def test_a_client_that_sends_all_before_it_reads_gets_its_refusal(server: Server) -> None:
    with Wire(server) as wire:
        wire.send("POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n")
        wire.send("x" * 2_000_000)
        status, headers, body = wire.answer()
        assert (status, headers["connection"], json.loads(body)["code"]) == (413, "close", "body_too_large")
        assert wire.ended()


def test_a_body_may_arrive_in_chunks_of_any_size(wire: Wire) -> None:
    body = json.dumps({"inputs": [[1, 0, 0, 0], [2, 0, 0, 0]]}).encode()
    for size in (1, 7, len(body)):
        wire.send("POST /predict/m HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(body), size):
            part = body[start : start + size]
            wire.send(b"%x\r\n%s\r\n" % (len(part), part))
        wire.send("0\r\n\r\n")
        status, _, answer = wire.answer()
        assert status == 200
        assert json.loads(answer)["outputs"]["sum"] == sums(1, 2)


def test_a_request_may_arrive_byte_by_byte(wire: Wire) -> None:
    for byte in request(5).encode():
        wire.send(bytes([byte]))
    assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(5)


def test_a_client_that_expects_100_continue_gets_it_or_an_error(wire: Wire) -> None:
    head, _, body = request(5, headers="expect: 100-continue\r\n").partition("\r\n\r\n")
    wire.send(head + "\r\n\r\n")
    assert wire.status()[0] == 100
    wire.send(body)
    assert wire.answer()[0] == 200
    wire.send("POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 999999\r\nexpect: 100-continue\r\n\r\n")
    status, _, answer = wire.answer()
    assert status == 413, "before the body is sent"
    assert json.loads(answer)["code"] == "body_too_large"


def test_a_connection_is_kept_or_closed_as_the_client_wants(server: Server) -> None:
    cases = (("1.1", "", True), ("1.1", "connection: close\r\n", False), ("1.0", "", False))
    for version, headers, kept in cases:
        with Wire(server) as wire:
            wire.send(request(1, version=version, headers=headers))
            status, answered, _ = wire.answer()
            assert status == 200
            assert (answered.get("connection") == "close") is not kept
            if kept:
                wire.send(request(2))
                assert wire.answer()[0] == 200
            else:
                assert wire.ended()


def test_a_refused_request_leaves_the_connection_usable(wire: Wire) -> None:
    for body in ("{", '{"inputs": [[1, 2]]}', "x" * 200_000):
        wire.send(f"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}")
        assert 400 <= wire.answer()[0] < 500
        wire.send(request(3))
        assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(3)


def test_a_pipelined_request_that_is_too_large_is_refused_in_its_turn(wire: Wire) -> None:
    large = "x" * 150_000
    wire.send(
        request(1)
        + f"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: {len(large)}\r\n\r\n{large}"
        + "POST /predict/m HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        + f"{len(large):x}\r\n{large}\r\n0\r\n\r\n"
        + request(2)
    )
    assert [wire.answer()[0] for _ in range(4)] == [200, 413, 413, 200]


def test_invalid_http_is_refused_and_does_not_disturb_others(server: Server) -> None:
    for text in ("nonsense\r\n\r\n", "POST /predict/m HTTP/1.1\r\ncontent-length: -1\r\n\r\n", "\0" * 100):
        with Wire(server) as wire:
            wire.send(text)
            assert wire.status()[0] == 400
    with Wire(server) as wire:
        wire.send(request(1))
        assert wire.answer()[0] == 200


def test_a_client_that_disconnects_in_the_middle_leaves_nothing(server: Server) -> None:
    whole = request(1)
    for length in range(10, len(whole) + 1, 7):
        with Wire(server) as wire:
            wire.send(whole[:length])
    with Wire(server) as wire:
        wire.send(request(1))
        assert wire.answer()[0] == 200
        server.wait_for_metric("in_flight_requests", at_most=0)


def test_a_client_that_does_not_read_delays_only_itself(server: Server) -> None:
    wide = request(*range(2000))
    with Wire(server) as deaf, Wire(server) as other:

        def flood() -> None:
            with contextlib.suppress(OSError):
                deaf.send(wide * 400)

        stuck = threading.Thread(target=flood, daemon=True)
        stuck.start()
        for number in range(20):
            other.send(request(number))
            assert json.loads(other.answer()[2])["outputs"]["sum"] == sums(number)
        deaf.socket.shutdown(socket.SHUT_RDWR)
        stuck.join(20)
        assert not stuck.is_alive()


def test_bodies_in_flight_are_bounded_for_all_together(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=1), "--in-flight-bytes", "1000")
    chunk = "a" * 600
    with Wire(server) as first, Wire(server) as second:
        idle = "POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n"
        first.send(idle)
        server.wait_for_metric("in_flight_requests", 1)
        second.send(request(*range(40)))
        assert second.answer()[0] == 200, "an announced body holds no bytes yet"
        first.send(chunk)
        for head in (
            "content-length: 600\r\n\r\n" + chunk,
            f"transfer-encoding: chunked\r\n\r\n258\r\n{chunk}\r\n0\r\n\r\n",
        ):
            second.send(f"POST /predict/m HTTP/1.1\r\nhost: x\r\n{head}")
            status, headers, body = second.answer()
            assert (status, json.loads(body)["code"]) == (503, "overloaded")
            assert headers["retry-after"]
        second.send(request(1))
        assert second.answer()[0] == 200, "a small one still fits"
    server.wait_for_metric("in_flight_requests", at_most=0)
    with Wire(server) as wire:
        wire.send(request(*range(300)))
        assert wire.answer()[0] == 200, "and a large one where no other is in flight"


def test_a_long_pipeline_of_refusals_is_answered_in_full(server: Server) -> None:
    count = 2000
    refused = "POST /predict/nobody HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
    with Wire(server) as wire:
        sender = threading.Thread(target=lambda: wire.send(request(1) + refused * count + request(2)))
        sender.start()
        assert [wire.answer()[0] for _ in range(count + 2)] == [200, *[404] * count, 200]
        sender.join()
    server.wait_for_metric("in_flight_requests", at_most=0)


def test_large_bodies_leave_room_for_small_ones(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=1), "--in-flight-bytes", "1600000")
    with Wire(server) as first, Wire(server) as second, Wire(server) as third:
        head = "POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 800000\r\n\r\n"
        for large in (first, second):
            large.send(head)
        # A head is refused if its body would find no room beside what others have sent.
        server.wait_for_metric("in_flight_requests", 2)
        for large in (first, second):
            large.send(" " * 740_000)
        server.wait_for_metric("in_flight_bytes", 1_480_000)
        body = request(1).partition("\r\n\r\n")[2].ljust(90_000)
        third.send(f"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 90000\r\n\r\n{body}")
        status, _, problem = third.answer()
        assert status == 503
        assert "other requests hold 1480000 of 1500000 bytes" in json.loads(problem)["detail"]
        for number in range(20):
            third.send(request(number))
            assert third.answer()[0] == 200
