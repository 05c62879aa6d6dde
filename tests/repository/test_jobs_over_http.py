"""Jobs through the real door: phases, the same request twice, cancelling, a load that ends its engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from onnx import helper, numpy_helper

from tests import huge_pages
from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client
from tests.conftest import MakeChaos, Serve
from tests.engine.processes import ENGINE, find
from tests.onnx_models import value, write_model, write_shift
from tests.server import Server, wait_until

ON = ("--admin-routes", "on")


def job(server: Server, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.get(f"/jobs/{name}").json()
    return found


def put_version(repository: Path, model: str, version: int, **settings: Any) -> None:
    folder = repository / model / str(version)
    folder.mkdir(parents=True)
    (folder / "model.chaos").write_text(json.dumps(settings))


class RunningServer(NamedTuple):
    """A server and its repository."""

    server: Server
    repository: Path


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the model `drains` wait for it if their row says so."""
    gate = tmp_path_factory.mktemp("gate") / "gate"
    os.mkfifo(gate)
    return gate


@pytest.fixture(scope="module")
def process(module_serve: Serve, module_make_chaos: MakeChaos, gate: Path) -> RunningServer:
    """A server with an engine, and a model for each test."""
    module_make_chaos("a")
    module_make_chaos("ends")
    repository = module_make_chaos("drains", "[versions]\nserve = [1, 2]", run_gate=str(gate))
    put_version(repository, "drains", 2)
    return RunningServer(
        module_serve(repository, *ON, "--engine", "process", "--web-processes", "1"), repository
    )


@pytest.fixture
def in_process(serve: Serve, make_chaos: MakeChaos) -> RunningServer:
    repository = make_chaos("a")
    return RunningServer(serve(repository, *ON, "--engine", "in-process"), repository)


@pytest.mark.parametrize("served", ["in_process", "process"])
def test_a_load_that_waits_is_one_job_shows_its_phase_and_is_cancelled(
    request: pytest.FixtureRequest, tmp_path: Path, served: str
) -> None:
    server, repository = request.getfixturevalue(served)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    put_version(repository, "a", 2, gate=str(gate))
    first = server.post("/models/a/load", json={"version": 2}).json()
    assert server.post("/models/a/load", json={"version": 2}).json()["id"] == first["id"]
    wait_until(lambda: job(server, first["id"])["phase"] == "load", "the load waits at its gate")
    found = job(server, first["id"])
    assert (found["state"], 0 < found["share"] < 1) == ("running", True)
    # The last load of the model says how long this one may take.
    assert found["seconds_left"] > 0
    assert server.get("/models/a/2").json()["phase"] == "load"
    assert server.post("/predict/a", json={"inputs": [[1, 2, 3, 4]]}).json()["version"] == "1"
    assert server.get("/health/ready").status_code == 200
    ended = httpx.delete(f"{server.url}/jobs/{first['id']}")
    assert (ended.status_code, ended.json()["state"]) == (200, "cancelled")
    assert httpx.delete(f"{server.url}/jobs/{first['id']}").status_code == 409
    wait_until(lambda: server.get("/models/a/2").json()["state"] == "unloaded", "the version is not loaded")
    # The thread that waits is given what it waits for; what it has loaded is thrown away.
    gate_end = os.open(gate, os.O_WRONLY)
    gate.unlink()
    gate.touch()
    os.close(gate_end)
    server.wait_for("a/2 is loaded, too late|a/2: the load is cancelled")
    again = server.post("/models/a/load", json={"version": 2}).json()
    assert again["id"] != first["id"]
    wait_until(lambda: job(server, again["id"])["state"] == "done", "the version is loaded")
    assert server.post("/predict/a", json={"inputs": [[1, 2, 3, 4]]}).json()["version"] == "2"


def test_an_engine_that_ends_during_an_unload_leaves_the_version_unloaded(
    process: RunningServer,
) -> None:
    server = process.server

    async def scenario() -> None:
        client = await Client.connect(server.port)
        client.send("/predict/drains/1", json.dumps({"inputs": [[chaos.WAIT, 2, 3, 4]]}).encode())
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 1)
        begun = (await asyncio.to_thread(server.post, "/models/drains/unload", json={"version": 1})).json()
        await asyncio.to_thread(
            wait_until,
            lambda: server.get("/models/drains/1").json()["state"] == "draining",
            "the version drains",
        )
        [engine] = find(server, ENGINE)
        os.kill(engine, signal.SIGKILL)
        await asyncio.to_thread(
            wait_until, lambda: server.get("/models/drains/1").json()["state"] == "unloaded", "it is unloaded"
        )
        await asyncio.to_thread(
            wait_until, lambda: job(server, begun["id"])["state"] == "done", "the job is done"
        )
        assert (await client.receive()).status == 503
        await client.close()

    asyncio.run(scenario())
    body = {"inputs": [[1, 2, 3, 4]]}
    wait_until(
        lambda: server.post("/predict/drains/2", json=body).status_code == 200, "the other one answers"
    )
    assert server.post("/predict/drains/1", json=body).status_code == 503


def test_a_load_that_ends_its_engine_fails_its_job_and_no_request(process: RunningServer) -> None:
    server, repository = process
    put_version(repository, "ends", 2, load_crashes=True)
    begun = server.post("/models/ends/load", json={"version": 2}).json()

    def is_over() -> bool:
        reply = server.post("/predict/ends", json={"inputs": [[1, 2, 3, 4]]})
        assert (reply.status_code, reply.json().get("version")) == (200, "1"), reply.text
        assert server.get("/health/live").status_code == 200
        return bool(job(server, begun["id"])["state"] != "running")

    wait_until(is_over, "the job ends")
    ended = job(server, begun["id"])
    assert ended["state"] == "failed"
    assert "ended the engine" in ended["reason"]


def holds_less(server: Server, bytes_: float) -> bool:
    return server.resident_bytes(spare=False) < bytes_


SIDE = 4500
WEIGHTS_BYTES = 4 * SIDE * SIDE
"""81 MB: what a process allocates besides is small beside it."""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a large and a small model."""
    weights = numpy_helper.from_array(np.ones((SIDE, SIDE), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "big",
        [value("x", "FP32", ["rows", SIDE])], [value("y", "FP32", ["rows", SIDE])], [weights],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("big")
    write_model(folder, "big", graph)
    write_shift(folder, "small", 1, 1.0)
    return folder


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_an_unloaded_model_gives_its_memory_back(serve: Serve, big: Path, engine: str) -> None:
    server = serve(big, *ON, "--engine", engine)
    # The first request that is no prediction imports what such requests need, and that stays.
    assert server.post("/v2/repository/models/small/unload").status_code == 200
    assert server.post("/v2/repository/models/small/load").status_code == 200
    for _ in range(2):
        held = server.resident_bytes(spare=False)
        assert server.post("/v2/repository/models/big/unload").status_code == 200
        low = held - 0.94 * WEIGHTS_BYTES
        wait_until(partial(holds_less, server, low), "the memory is given back")
        assert server.post("/v2/repository/models/big/load").status_code == 200
    assert server.resident_bytes(spare=False) < held + 30e6
    huge = huge_pages.held_bytes(server.processes())
    if huge < WEIGHTS_BYTES / 2 and (reason := huge_pages.missing()):
        pytest.skip(reason)
    assert huge > WEIGHTS_BYTES / 2, "an unload gives few pages back, and stalls no request for long"
