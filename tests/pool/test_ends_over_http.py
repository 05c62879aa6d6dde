"""Runs that do not end by themselves: the deadline, the client, the run timeout and SIGTERM end them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import onnx_models
from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, with_clients
from tests.conftest import MakeChaos, Serve
from tests.server import START_S, Server, wait_until

ENDLESS = 10**12
"""Turns of the loop that take days."""


def turns() -> onnx.ModelProto:
    """A model that adds up as many ones as each row says, in a loop of that many turns; one row at a time."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "step"], ["sum_out"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, [1]),
        ],
        [numpy_helper.from_array(np.ones(1, np.float32), "step")],
    )
    return onnx_models.model(
        [
            helper.make_node("Squeeze", ["count"], ["n"]),
            helper.make_node("Loop", ["n", "yes", "start"], ["total"], body=body),
        ],
        [onnx_models.value("count", "INT64", [1])],
        [onnx_models.value("total", "FP32", [1])],
        [
            numpy_helper.from_array(np.array(True), "yes"),
            numpy_helper.from_array(np.zeros(1, np.float32), "start"),
        ],
    )


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A repository with the model of `turns`."""
    onnx_models.save(turns(), tmp_path / "repository" / "turns" / "1")
    return tmp_path / "repository"


@pytest.fixture(scope="module")
def turning(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of the same model, with more time for the end than a test has."""
    repository = tmp_path_factory.mktemp("turning")
    onnx_models.save(turns(), repository / "turns" / "1")
    return module_serve(repository, "--drain-timeout-s", "3600")


def ask(server: Server, count: int, **parameters: float) -> httpx.Response:
    """Ask for a sum of `count` ones."""
    return server.post("/predict/turns", json={"inputs": [count], "parameters": parameters})


def hang_up(server: Server, model: str, rows: object) -> socket.socket:
    """Send a request on a connection of its own; closing the connection gives the request up."""
    body = json.dumps({"inputs": rows}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        f"POST /predict/{model} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def test_the_deadline_holds_while_the_model_runs(turning: Server) -> None:
    server = turning
    began = time.monotonic()
    reply = ask(server, ENDLESS, timeout_ms=500)
    assert (reply.status_code, reply.json()["code"]) == (504, "deadline_exceeded")
    assert "while the model ran" in reply.json()["detail"]
    assert 0.45 < time.monotonic() - began < 30
    # The run was stopped, so the only instance is free again.
    assert ask(server, 7).json()["outputs"]["total"] == [7]
    assert server.get("/health").json()["status"] == "ok"


def test_a_run_ends_when_its_client_has_gone(turning: Server) -> None:
    server = turning
    with hang_up(server, "turns", [ENDLESS]):
        server.wait_for_metric("in_flight_requests", at_least=1)
        before = server.metric("instance_busy_seconds_total")
        server.wait_for_metric(
            "instance_busy_seconds_total", at_least=before + 0.2
        )  # it grows during the run
    server.wait_for_metric("dropped_entries_total", at_least=1, reason="disconnected")
    assert ask(server, 7).json()["outputs"]["total"] == [7]


def test_a_second_signal_ends_the_server_while_a_model_runs(turning: Server) -> None:
    """The second signal does not wait for the drain timeout. This is the last test of this server."""
    with hang_up(turning, "turns", [ENDLESS]):
        turning.wait_for_metric("in_flight_requests", at_least=1)
        turning.process.send_signal(signal.SIGTERM)
        turning.wait_for("draining")
        assert turning.stop(START_S) == 1


def test_a_run_that_takes_too_long_is_answered_so(serve: Serve, endless: Path) -> None:
    server = serve(endless, "--run-timeout-s", "0.5")
    server.wait_loaded()
    reply = ask(server, ENDLESS)
    assert (reply.status_code, reply.json()["code"]) == (504, "run_timeout")
    assert ask(server, 7).json()["outputs"]["total"] == [7]
    server.wait_for("is stopped")


@pytest.mark.parametrize("server_module", ["tests.servers.short_grace"], indirect=True)
def test_neighbours_of_a_run_that_does_not_end_are_answered_soon(serve: Serve, make_chaos: MakeChaos) -> None:
    config = "[instances]\ncount = 1\n[batching]\nmax_delay_ms = 1000\n"
    server = serve(make_chaos("m", config=config), "--run-timeout-s", "300")
    server.wait_loaded()
    rows = {first: [[float(first), 2.0, 3.0, 4.0]] for first in (1, 2, int(chaos.WAIT))}

    async def one(client: Client, number: int) -> None:
        first = [*rows][number]
        body: dict[str, object] = {"inputs": rows[first]}
        if first == chaos.WAIT:
            body["parameters"] = {"timeout_ms": 5000}
        reply = await client.post("/predict/m", json.dumps(body).encode())
        answers[first] = reply.status, json.loads(reply.body)

    answers: dict[int, tuple[int, dict[str, object]]] = {}
    asyncio.run(with_clients(server.port, 3, one))
    for first in (1, 2):
        assert answers[first][0] == 200
        assert answers[first][1]["outputs"] == {"sum": chaos.expected(np.array(rows[first])).tolist()}
    assert answers[int(chaos.WAIT)][0] == 504
    assert [*answers][-1] == chaos.WAIT, "they need not wait for their neighbour's deadline"
    server.wait_for("run again, one by one")
    assert server.stop() == 0


@pytest.mark.parametrize("server_module", ["tests.servers.short_grace"], indirect=True)
def test_an_instance_that_hangs_is_a_problem_and_is_replaced(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    repository = make_chaos("m", run_gate=str(gate), config="[instances]\ncount = 1\n")
    server = serve(repository, "--run-timeout-s", "0.5", "--drain-timeout-s", "1")
    server.wait_loaded()
    reply = server.post("/predict/m", json={"inputs": [[chaos.WAIT, 2, 3, 4]]})
    assert (reply.status_code, reply.json()["code"]) == (504, "run_timeout")
    wait_until(lambda: "m/1" in server.get("/health").json()["problems"], "the instance hangs")
    problem = server.get("/health").json()["problems"]["m/1"]
    assert re.fullmatch(r"1 of 2 instances hang: a run has taken \d+ s", problem)
    assert server.metric("instances", state="hung") == 1
    row = [[1.0, 2.0, 3.0, 4.0]]
    answer = server.post("/predict/m", json={"inputs": row}).json()
    assert answer["outputs"]["sum"] == chaos.expected(np.array(row)).tolist()
    before = server.metric("instance_busy_seconds_total")
    server.wait_for_metric("instance_busy_seconds_total", at_least=before + 0.1)
    chaos.open_gate(gate)
    wait_until(lambda: server.get("/health").json()["status"] == "ok", "the run has ended after all")
    server.wait_for("runs again after")


@pytest.mark.parametrize("server_module", ["tests.servers.short_grace"], indirect=True)
def test_sigterm_ends_a_server_whose_model_hangs(serve: Serve, make_chaos: MakeChaos, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    server = serve(make_chaos("m", run_gate=str(gate)), "--run-timeout-s", "0.5", "--drain-timeout-s", "1")
    server.wait_loaded()
    assert server.post("/predict/m", json={"inputs": [[chaos.WAIT, 2, 3, 4]]}).status_code == 504
    server.wait_for("does not stop")
    assert server.stop() == 1
    assert any("was still running" in line["message"] for line in server.log)


def test_sigterm_ends_a_run_that_does_not_end(serve: Serve, endless: Path) -> None:
    """The request is answered when the drain timeout is over, and counts as not answered in time."""
    server = serve(endless, "--drain-timeout-s", "1")
    server.wait_loaded()
    with hang_up(server, "turns", [ENDLESS]) as connection:
        server.wait_for_metric("in_flight_requests", at_least=1)
        assert server.stop() == 1
        reply = connection.makefile("rb").read()
    assert reply == b"" or b'"draining"' in reply
