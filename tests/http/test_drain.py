"""SIGTERM: accepted requests are answered, later clients told to go, and the exit status tells of losses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from inferpool.server import InProcessServer
from onnx import helper, numpy_helper

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, with_clients
from tests.conftest import MakeChaos, Serve, in_both_engines, in_one_and_several_processes
from tests.onnx_models import value, write_model
from tests.server import CHAOS, ROOT, START_S, Server, free_port, wait_until

ROW = {"inputs": [[1, 2, 3, 4]]}
WAITING_ROW = {"inputs": [[chaos.WAIT, 2, 3, 4]]}
"""A run of this row lasts until the test opens the gate."""


def is_unready(server: Server) -> bool:
    """Whether readiness has gone."""
    return server.get("/health/ready").status_code != 200


@in_one_and_several_processes
def test_sigterm_under_load_loses_no_accepted_request(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=20, config="[batching]\nmax_rows = 4\n[instances]\ncount = 1\n"))
    clients, answered, terminated = 64, 0, False
    endings: list[str] = []

    async def ask(client: Client, number: int) -> None:
        nonlocal answered
        rng = np.random.default_rng(number)
        while True:
            rows = rng.integers(0, 9, (1, 4)).astype(float)
            client.send("/predict/m", json.dumps({"inputs": rows.tolist()}).encode())
            accepted = not terminated
            try:
                reply = await client.receive()
            except (asyncio.IncompleteReadError, ConnectionError):
                assert not accepted, "a request that was there before the signal got no answer"
                endings.append("closed")
                return
            if reply.status == 200:
                assert json.loads(reply.body)["outputs"]["sum"] == chaos.expected(rows).tolist()
                answered += 1
                if reply.headers.get("connection") == "close":
                    endings.append("asked to go")
                    return
            else:
                assert (reply.status, json.loads(reply.body)["code"]) == (503, "draining")
                assert reply.headers["connection"] == "close"
                endings.append("refused")
                return

    async def load() -> None:
        nonlocal terminated
        work = asyncio.create_task(with_clients(server.port, clients, ask))
        await asyncio.to_thread(server.wait_for_metric, "queue_rows", clients / 2, model="m")
        assert not work.done()
        before = answered
        server.process.terminate()
        await asyncio.to_thread(server.wait_for, "draining")
        terminated = True
        await work
        assert answered - before >= clients / 2, "requests that waited when the signal came are answered"

    asyncio.run(load())
    assert server.process.wait(30) == 0
    assert len(endings) == clients


@in_both_engines
def test_readiness_goes_first_later_clients_are_asked_to_go_then_refused_and_work_is_finished(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # One instance waits at the gate, and the other one answers.
    repository = make_chaos("m", "[instances]\ncount = 2\n", run_gate=str(gate))
    server = serve(repository, "--drain-settle-s", "8")
    body = json.dumps(ROW).encode()

    async def scenario() -> None:
        accepted, idle, kept, late, unfinished = [await Client.connect(server.port) for _ in range(5)]
        accepted.send("/predict/m", json.dumps(WAITING_ROW).encode())
        # A client that never finishes its body does not hold up the end.
        unfinished.send("/predict/m", body[:-1], {"content-length": str(len(body))})
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 2)
        for client in (idle, kept):
            assert "connection" not in (await client.post("/predict/m", body)).headers
        server.process.terminate()
        await asyncio.to_thread(wait_until, lambda: is_unready(server), "readiness goes")
        assert server.get("/health").json()["status"] == "draining"
        for path in ("/health/live", "/models", "/nothing", "/v2/health/live", "/predict/m"):
            answer = server.get(path)
            assert answer.headers["connection"] == "close", path
        for client in (kept, late):
            reply = await client.post("/predict/m", body)
            assert (reply.status, reply.headers["connection"]) == (200, "close")
            with pytest.raises(asyncio.IncompleteReadError):
                await client.receive()
        # An idle connection is closed without a response: the client could take it for its next one.
        with pytest.raises(asyncio.IncompleteReadError) as ended:
            await idle.receive()
        assert ended.value.partial == b""

        await asyncio.to_thread(server.wait_for, "the settle time is over")
        refused = server.post("/predict/m", json=ROW)
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        assert server.get("/health/live").status_code == 200
        assert server.get("/health").json()["status"] == "draining"
        await asyncio.to_thread(chaos.open_gate, gate)
        assert (await accepted.receive()).status == 200
        assert server.process.wait(30) == 0
        for client in (accepted, idle, kept, late, unfinished):
            await client.close()

    asyncio.run(scenario())


@in_both_engines
def test_a_request_that_outlasts_the_drain_timeout_makes_the_exit_status_1(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    server = serve(make_chaos("m", run_gate=str(gate)), "--drain-timeout-s", "0.2")

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as session:
            unanswered = asyncio.create_task(session.post("/predict/m", json=WAITING_ROW))
            await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 1)
            server.process.terminate()
            await asyncio.wait([unanswered])
            if unanswered.exception() is None:  # an engine of its own drains later than its web process
                assert (unanswered.result().status_code, unanswered.result().json()["code"]) == (
                    503,
                    "draining",
                )

    asyncio.run(scenario())
    assert server.process.wait(30) == 1


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_sigterm_while_a_model_loads_ends_with_the_usual_status(
    serve: Serve, tmp_path: Path, delay_s: float
) -> None:
    """The runtime is at work in a thread that nobody can stop."""
    names = ["x", *(f"step{number}" for number in range(1, 20)), "y"]
    eye = numpy_helper.from_array(np.eye(512, dtype=np.float32), "eye")
    graph = helper.make_graph(
        [helper.make_node("MatMul", [a, "eye"], [b]) for a, b in pairwise(names)],
        "slow",
        [value("x", "FP32", ["rows", 512])],
        [value("y", "FP32", ["rows", 512])],
        [eye],
    )
    write_model(tmp_path, "slow", graph)
    server = serve(
        tmp_path, wait=False,
        INFERPOOL_MEASURE_MS="20000", INFERPOOL_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    time.sleep(delay_s)
    assert server.stop() == 0, server.log
    assert not [line for line in server.log if "terminate" in line["message"]]


@pytest.fixture
def starting(
    make_chaos: MakeChaos, engine_variables: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that has just begun to listen, and its port."""
    port = free_port()
    environ = {**os.environ, **engine_variables, "PYTHONPATH": f"{ROOT}:{CHAOS}"}
    command = [sys.executable, "-m", "inferpool", "serve", str(make_chaos("m")), "--port", str(port)]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: accepts(port), "the server listens")
        yield process, port
        process.kill()


def accepts(port: int) -> bool:
    """Whether the kernel accepts connections for the server."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@in_both_engines
def test_signals_at_the_earliest_moment_wait_for_the_server(
    starting: tuple[subprocess.Popen[str], int],
) -> None:
    process, _ = starting
    process.send_signal(signal.SIGHUP)
    process.terminate()
    _, log = process.communicate(timeout=START_S)
    assert process.returncode == 0, log


def test_a_hangup_at_the_earliest_moment_ends_nothing(starting: tuple[subprocess.Popen[str], int]) -> None:
    process, port = starting
    process.send_signal(signal.SIGHUP)
    answer = httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=START_S)
    assert answer.status_code == 200
    assert process.poll() is None


def test_a_signal_is_answered_by_the_event_loop_because_its_handler_may_interrupt_a_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    asked: list[Callable[[], object]] = []
    server = InProcessServer.__new__(InProcessServer)
    server.__dict__["loop"] = SimpleNamespace(
        is_closed=lambda: False, call_soon_threadsafe=lambda *call: asked.append(partial(*call))
    )
    for name in ("_draining", "_ending", "_repository"):
        server.__dict__[name] = Mock()
    server.handle_exit(signal.SIGTERM, None)
    server._rescan(signal.SIGHUP, None)
    assert not caplog.records
    for answer in asked:
        answer()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("SIGTERM: stopping at once")
    assert lines[1].startswith("SIGHUP: looking")
    assert server.force_exit
