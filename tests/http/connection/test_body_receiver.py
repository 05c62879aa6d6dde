"""Large bodies, which are received straight into their memory, and the requests around them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from inferpool.http.connection.body_receiver import LEAST_RECEIVED_BYTES

from tests.chaos import inferpool_chaos as chaos
from tests.conftest import MakeChaos, Serve
from tests.http.connection.test_pipelining import Wire, request, sums
from tests.server import Server, wait_until

Form = Callable[[np.ndarray], bytes]
ROWS = 3 * LEAST_RECEIVED_BYTES // 16
"""Rows of four numbers, sixteen bytes."""


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    return module_serve(module_make_chaos("m"), "--max-body-bytes", str(32 * 2**20), "--log-level", "info")


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server) as made:
        yield made


def rows(seed: int, count: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 9, (count, 4)).astype(np.float32)


def binary(values: np.ndarray, *fields: str) -> bytes:
    size = {"binary_data_size": values.nbytes}
    described = {"name": "x", "datatype": "FP32", "shape": values.shape, "parameters": size}
    head = json.dumps({"inputs": [described]}).encode()
    return post(
        "/v2/models/m/infer",
        head + values.tobytes(),
        f"inference-header-content-length: {len(head)}",
        *fields,
    )


def native(values: np.ndarray, *fields: str) -> bytes:
    return post("/predict/m", json.dumps({"inputs": values.tolist()}).encode(), *fields)


def post(path: str, body: bytes, *fields: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def check(answer: tuple[int, dict[str, str], bytes], values: np.ndarray) -> None:
    status, _, body = answer
    assert status == 200, body[:300]
    outputs = json.loads(body)["outputs"]
    found = outputs[0]["data"] if isinstance(outputs, list) else outputs["sum"]
    np.testing.assert_array_equal(np.array(found).reshape(-1), np.array(chaos.expected(values)).reshape(-1))


@pytest.mark.parametrize("form", [binary, native])
def test_large_and_small_bodies_alternate_on_a_connection(wire: Wire, form: Form) -> None:
    for seed in range(2):
        wire.send(form(rows(seed)))
        check(wire.answer(), rows(seed))
        wire.send(request(seed))
        status, _, body = wire.answer()
        assert status == 200
        assert json.loads(body)["outputs"]["sum"] == sums(seed)
        wire.send("GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.answer()[0] == 200


@pytest.mark.parametrize("form", [binary, native])
@pytest.mark.parametrize("size", [1, 777, 70_000])
def test_a_body_may_arrive_in_sends_of_any_size(wire: Wire, form: Form, size: int) -> None:
    data = form(rows(1))
    # Byte by byte for a while only, at the front, over the end of the head, and at the end.
    edge = 600 * size if size < 1000 else len(data)
    middle = data[edge:-edge] if size < 1000 else b""
    front, back = (data[:edge], data[-edge:]) if middle else (data, b"")
    for part in (front, middle, back):
        step = size if part is not middle else len(part) or 1
        for start in range(0, len(part), step):
            wire.send(part[start : start + step])
    check(wire.answer(), rows(1))


def test_requests_behind_a_large_body_are_answered_in_order(wire: Wire) -> None:
    text = b"".join(
        (binary(rows(1)), request(1).encode(), native(rows(2)), binary(rows(3)), request(2).encode())
    )
    wire.send(text)
    check(wire.answer(), rows(1))
    assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(1)
    check(wire.answer(), rows(2))
    check(wire.answer(), rows(3))
    assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(2)


def test_a_large_body_waits_to_be_asked_for(wire: Wire) -> None:
    data = binary(rows(4), "expect: 100-continue")
    head, _, body = data.partition(b"\r\n\r\n")
    wire.send(head + b"\r\n\r\n")
    assert wire.status()[0] == 100
    wire.send(body)
    check(wire.answer(), rows(4))


def test_a_large_compressed_body_is_read(wire: Wire) -> None:
    values = np.random.default_rng(5).random((ROWS, 4)).astype(np.float32)
    packed = gzip.compress(json.dumps({"inputs": values.tolist()}).encode())
    assert len(packed) > 2 * LEAST_RECEIVED_BYTES
    wire.send(post("/predict/m", packed, "content-encoding: gzip"))
    status, _, body = wire.answer()
    assert status == 200, body
    assert np.shape(json.loads(body)["outputs"]["sum"])[0] == ROWS


def test_a_large_invalid_body_is_refused_and_the_connection_stays_usable(wire: Wire) -> None:
    for body, status in ((b"{" * 500_000, 422), (b'{"inputs":[[' + b"1," * 400_000 + b"1]]}", 422)):
        wire.send(post("/predict/m", body))
        assert wire.answer()[0] == status
        wire.send(request(1))
        assert wire.answer()[0] == 200


def test_a_body_that_is_refused_while_it_arrives_is_discarded(serve: Serve, make_chaos: MakeChaos) -> None:
    """Other requests hold the memory meanwhile; the rest of the body is not read."""
    size = 12 * 2**20
    server = serve(make_chaos("m"), "--max-body-bytes", str(2 * size), "--in-flight-bytes", str(size))
    data = post("/predict/m", b" " * size)
    with Wire(server) as first, Wire(server) as second:
        first.send(data[: size * 2 // 3])
        second.send(data[: size // 2])
        before = server.resident_bytes()
        status, headers, body = second.answer()
        assert (status, json.loads(body)["code"]) == (503, "overloaded")
        assert headers["connection"] == "close"
        assert second.ended()
        assert server.resident_bytes() - before < size // 4
        first.send(data[size * 2 // 3 :])
        assert first.answer()[0] == 400
        server.wait_for_metric("in_flight_requests", at_most=0)


def test_memory_goes_back_after_a_burst(server: Server) -> None:
    data = post("/predict/m", b"[" * (24 * 2**20))
    before = server.resident_bytes()
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(6)]
        for wire in wires:
            wire.send(data)
        for wire in wires:
            assert wire.answer()[0] == 422
        # While the connections are idle, nothing holds a body any more, and the heap is trimmed.
        wait_until(lambda: server.resident_bytes() - before < len(data), "the memory of before")


def test_a_client_that_disconnects_in_the_middle_of_a_body_leaves_nothing(server: Server) -> None:
    data = binary(rows(6))
    for size in (300, len(data) // 2, len(data) - 1):
        with Wire(server) as wire:
            wire.send(data[:size])
    with Wire(server) as wire:
        wire.send(data)
        check(wire.answer(), rows(6))
        server.wait_for_metric("in_flight_requests", at_most=0)


def test_a_connection_with_connection_close_ends_after_its_response(wire: Wire) -> None:
    wire.send(binary(rows(7), "connection: close") + request(1).encode())
    check(wire.answer(), rows(7))
    assert wire.ended()
