"""A fault between the queue and the last byte ends the request: no client waits for ever."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.conftest import Serve, chaos_in
from tests.grpc_api.calls import Caller, raw_request
from tests.onnx_models import write_shift
from tests.server import Server, wait_until
from tests.servers.faults import FAULT_FILE
from tests.text_models import write_encoder

pytestmark = pytest.mark.parametrize("server_module", ["tests.servers.faults"], indirect=True, scope="module")

ANSWER_S = 60
"""A client that waits so long would wait for ever."""
CLOSED = 0
"""In place of a status: the connection was closed without one."""
ROW = b'{"inputs": [[1, 2]]}'
LARGE_ROWS = b'{"inputs": [' + b", ".join([b"[1, 2]"] * 120_000) + b"]}"
BINARY_ROW = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}
).encode()
JSON_ROW = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}'
ARROW = {"accept": "application/vnd.apache.arrow.stream"}
CSV = {"content-type": "text/csv", "accept": "text/csv"}
SHARED, NATIVE, TEXTS = "/predict/shared", "/predict/shift", "/v1/embeddings"


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fault") / "fault"
    file.write_text("")
    return file


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module")
def server(
    module_serve: Serve, tmp_path_factory: pytest.TempPathFactory, fault_file: Path, gate: Path
) -> Server:
    folder = tmp_path_factory.mktemp("models")
    for version in (1, 2):
        write_shift(folder, "shift", version, 1.0)
    (folder / "shift" / "model.toml").write_text("[versions]\nlabels = {stable = 1}\n[labels]\n")
    (folder / "shift" / "labels.txt").write_text("first\nsecond\n")
    write_encoder(folder, "texts", "[text]\nmax_tokens = 128\n[text.embeddings]\noutput = 'pooled'\n")
    make = chaos_in(folder)
    make("shared", "[cache]\nenabled = true\n[instances]\ncount = 1\n", run_gate=str(gate))
    make("waits")
    return module_serve(
        folder, "--measure-ms", "0", "--admin-routes", "on", "--grpc-port", "0", "--access-log",
        INFERPOOL_ENGINE="in-process", **{FAULT_FILE: str(fault_file)},
    )  # fmt: skip


@pytest.fixture
def arm(server: Server, fault_file: Path) -> Iterator[Callable[[str], None]]:
    """Let a fault happen; after the test it has happened once, was logged once, and has left nothing."""
    armed: list[str] = []

    def logged() -> list[str]:
        return [text for line in server.log if f"fault of {armed[0]}\n" in (text := _exception(line) + "\n")]

    def let(fault: str) -> None:
        armed.append(fault)
        before.append(len(logged()))
        fault_file.write_text(fault)

    before: list[int] = []
    yield let
    wait_until(lambda: not fault_file.read_text(), "the fault happens")
    wait_until(lambda: len(logged()) > before[0], "the fault is logged")
    server.wait_for_metric("in_flight_requests", at_most=0)
    assert _post(server, NATIVE, ROW) == 200
    assert len(logged()) == before[0] + 1
    assert "Traceback" in logged()[-1]


def _exception(line: Mapping[str, object]) -> str:
    return str(line.get("exception", ""))


def _post(server: Server, path: str, body: bytes, headers: Mapping[str, str] = {}) -> int:
    """The status of a request, or `CLOSED`."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)
    try:
        connection.request("POST", path, body, dict(headers))
        response = connection.getresponse()
        response.read()
        return response.status
    except (ConnectionError, HTTPException):
        return CLOSED
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "path", "body", "headers", "status"),
    [
        ("native", NATIVE, ROW, {}, 500),
        ("native", NATIVE, b"x[0],x[1]\n1,2\n", CSV, 500),
        ("native", NATIVE, ROW, ARROW, 500),
        ("v2", "/v2/models/shift/infer", JSON_ROW, {}, 500),
        (
            "v2",
            "/v2/models/shift/infer",
            BINARY_ROW + np.ones(2, np.float32).tobytes(),
            {"inference-header-content-length": str(len(BINARY_ROW))},
            500,
        ),
        ("v1", "/v1/models/shift:predict", b'{"instances": [[1, 2]]}', {}, 500),
        ("openai", TEXTS, b'{"model": "texts", "input": "w1 w2"}', {}, 500),
        ("labels", NATIVE, ROW, {}, 500),
        ("timing", NATIVE, ROW, {}, 500),
        ("count", NATIVE, ROW, {}, 500),
        ("queue", NATIVE, ROW, {}, 500),
        ("cached", SHARED, b'{"inputs": [[1, 2, 3, 4]]}', {}, 500),
        ("large answer", NATIVE, LARGE_ROWS, {}, 500),
        ("large head", NATIVE, LARGE_ROWS, {}, CLOSED),
        ("head", NATIVE, ROW, {}, CLOSED),
        ("head", "/v2/models/shift/infer", JSON_ROW, {}, CLOSED),
        ("head", TEXTS, b'{"model": "texts", "input": "w1 w2"}', {}, CLOSED),
        ("refusal", NATIVE, b'{"inputs": 7}', {}, CLOSED),
        ("refusal", "/predict/nobody", ROW, {}, CLOSED),
        ("gate", NATIVE, ROW, {"x-not-seen": "before"}, CLOSED),
        ("access log", NATIVE, ROW, {}, 200),
        ("cache", SHARED, b'{"inputs": [[5, 6, 7, 8]]}', {}, 200),
    ],
)
def test_a_fault_after_the_model_has_run_ends_its_request(
    server: Server,
    arm: Callable[[str], None],
    fault: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    status: int,
) -> None:
    counted = server.metric("requests_total")
    arm(fault)
    assert _post(server, path, body, headers) == status
    assert server.metric("requests_total") == counted + (fault != "gate")


def test_a_fault_after_the_response_closes_the_connection(server: Server, arm: Callable[[str], None]) -> None:
    """The client has its answer by then."""
    arm("budget")
    assert _post(server, NATIVE, ROW) in (200, CLOSED)


def test_a_fault_of_a_shadow_costs_the_request_nothing(server: Server, arm: Callable[[str], None]) -> None:
    traffic = {"shadow": {"version": 2, "share": 1.0}}
    assert server.request("PUT", "/models/shift/traffic", json=traffic).status_code == 200
    arm("shadow")
    assert _post(server, NATIVE, ROW) == 200
    assert server.request("DELETE", "/models/shift/traffic").status_code == 200
    assert server.metric("shadow_copies_total", outcome="failed") == 1


def test_a_fault_at_the_deadline_ends_the_request(server: Server, arm: Callable[[str], None]) -> None:
    arm("deadline")
    body = json.dumps({"inputs": [[chaos.WAIT, 0, 0, 0]]}).encode()
    assert _post(server, "/predict/waits", body, {"x-timeout-ms": "400"}) == 500


def test_followers_end_if_the_answer_cannot_be_shared(
    server: Server, arm: Callable[[str], None], gate: Path
) -> None:
    statuses: list[int] = []
    body = json.dumps({"inputs": [[chaos.WAIT, 0, 0, 0]]}).encode()
    clients = [
        threading.Thread(target=lambda: statuses.append(_post(server, SHARED, body))) for _ in range(3)
    ]
    for client in clients:
        client.start()
    server.wait_for_metric("in_flight_requests", at_least=3)
    arm("sharing")
    chaos.open_gate(gate)
    for client in clients:
        client.join()
    assert sorted(statuses) == [200, 500, 500]


@pytest.mark.parametrize(("fault", "code"), [("v2", grpc.StatusCode.INTERNAL), ("head", None)])
def test_a_fault_ends_a_call_of_grpc_or_the_call_is_made_again(
    server: Server, arm: Callable[[str], None], fault: str, code: grpc.StatusCode | None
) -> None:
    caller = Caller(server)
    request = raw_request("shift", "x", "FP32", (1, 2), np.ones(2, np.float32).tobytes())
    arm(fault)
    error = caller.begin(request, ANSWER_S).exception()
    assert (None if error is None else error.code()) == code
    caller.close()
