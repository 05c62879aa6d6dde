"""Versions in several engines: one for each device, or several for one device."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client
from tests.conftest import MakeChaos, Serve, chaos_in
from tests.engine.processes import ENGINE, children, find, lives
from tests.engine.test_processes import ONE_WEB, ROW, SUM, WAITING_ROW, Load
from tests.server import Server, wait_until

ON = (*ONE_WEB, "--admin-routes", "on")


def version(server: Server, model: str) -> dict[str, Any]:
    [found] = server.get(f"/models/{model}").json()["versions"]
    return dict(found)


def engines(server: Server, model: str) -> dict[str, int]:
    """The process of each engine of a model."""
    return {engine["name"]: engine["pid"] for engine in version(server, model)["engines"]}


def has_ended(server: Server, job: str) -> bool:
    return bool(server.get(job).json()["state"] != "running")


class TwoEngines(NamedTuple):
    """A server with two engines for the CPU, and the files at which its model waits if they are pipes.

    Attributes:
        gate: for loads.
        run_gate: for marked runs.
    """

    server: Server
    gate: Path
    run_gate: Path


@pytest.fixture(scope="module")
def two_engines(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> TwoEngines:
    folder = tmp_path_factory.mktemp("two_engines")
    gate, run_gate = folder / "gate", folder / "run_gate"
    gate.touch()
    os.mkfifo(run_gate)
    repository = chaos_in(folder / "repository")("m", run_ms=2, gate=str(gate), run_gate=str(run_gate))
    return TwoEngines(module_serve(repository, *ONE_WEB, "--engines-per-device", "2"), gate, run_gate)


def test_while_one_of_two_engines_is_replaced_the_other_one_answers(two_engines: TwoEngines) -> None:
    server, gate, _ = two_engines
    assert sorted(engines(server, "m")) == ["cpu", "cpu-2"]
    assert len(version(server, "m")["instances"]) == 2
    load = Load(server, clients=4)

    async def kill(engine: str) -> None:
        gate.unlink()
        os.mkfifo(gate)  # the successor cannot load until somebody opens this
        await load.answered(20)
        os.kill(engines(server, "m")[engine], signal.SIGKILL)
        problems = {"m/1": f"{engine}: its engine is being restarted"}
        await asyncio.to_thread(
            wait_until, lambda: server.get("/health").json()["problems"] == problems, "one engine is down"
        )
        assert server.get("/health").json()["status"] == "degraded"
        assert server.get("/health/ready").status_code == 200
        await load.answered(20)
        await asyncio.to_thread(chaos.open_gate, gate)
        await asyncio.to_thread(
            wait_until, lambda: server.get("/health").json()["status"] == "ok", "both engines are up"
        )

    async def kill_each() -> None:
        await kill("cpu")
        await kill("cpu-2")

    asyncio.run(load.run(kill_each()))
    assert set(load.statuses) == {200}
    assert load.lost == 0
    assert server.metric("engine_restarts_total", engine="cpu") == 1
    assert server.metric("engine_restarts_total", engine="cpu-2") == 1
    assert server.metric("instances", model="m", state="ready") == 2


def test_an_interrupt_from_the_terminal_drains(two_engines: TwoEngines) -> None:
    """A terminal sends SIGINT to every process of the server. The last test of this one."""
    server = two_engines.server

    async def scenario() -> None:
        client = await Client.connect(server.port)
        client.send("/predict/m", json.dumps(WAITING_ROW).encode())
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 1)
        pids = children(server)
        for pid in (server.process.pid, *pids):
            os.kill(pid, signal.SIGINT)
        await asyncio.to_thread(server.wait_for, "SIGINT: draining")
        await asyncio.to_thread(chaos.open_gate, two_engines.run_gate)
        assert (await client.receive()).status == 200
        await client.close()
        assert server.process.wait(30) == 0
        assert not any(map(lives, pids))

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def two_devices(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    """A server of a GPU that is not there; one model is configured for the CPU."""
    module_make_chaos("there", "[instances]\ndevices = ['cpu']\n", run_ms=1)
    repository = module_make_chaos("nowhere")
    return module_serve(repository, *ON, "--devices", "cuda:0")


def test_a_model_for_a_device_that_the_settings_do_not_name_gets_an_engine_there(two_devices: Server) -> None:
    server = two_devices
    wait_until(lambda: version(server, "there")["state"] == "ready", "the engine of the CPU has loaded")
    assert list(engines(server, "there")) == ["cpu"]
    nowhere = version(server, "nowhere")
    assert (nowhere["state"], nowhere["engine"]["name"]) == ("failed", "cuda:0")
    assert "cuda:0" in nowhere["reason"]
    assert len(find(server, ENGINE)) == 2
    assert server.post("/predict/there", json=ROW).json()["outputs"]["sum"] == SUM


def test_the_engine_of_a_device_ends_alone(two_devices: Server) -> None:
    server = two_devices
    wait_until(lambda: version(server, "there")["state"] == "ready", "the engine of the CPU has loaded")
    load = Load(server, "there", clients=2)
    before = engines(server, "there")
    card = version(server, "nowhere")["engine"]["pid"]

    async def kill() -> None:
        await load.answered(10)
        os.kill(card, signal.SIGKILL)
        await asyncio.to_thread(
            wait_until,
            lambda: server.metric("engine_restarts_total", engine="cuda:0") == 1,
            "the engine of the card has ended",
        )
        await load.answered(10)

    asyncio.run(load.run(kill()))
    assert set(load.statuses) == {200}
    assert engines(server, "there") == before
    assert server.metric("engine_restarts_total", engine="cpu") == 0


def ask_once_the_engine_is_there(server: Server, path: str) -> httpx.Response:
    """Post until the answer is not 503: another test may have ended the engine just before."""
    answers: list[httpx.Response] = []

    def is_taken() -> bool:
        answers.append(server.post(path))
        return answers[-1].status_code != 503

    wait_until(is_taken, "the engine is there")
    return answers[-1]


def test_an_administrator_loads_and_unloads_in_the_engine_that_has_the_device(two_devices: Server) -> None:
    server = two_devices
    for action, state in (("unload", "unloaded"), ("load", "ready")):
        job = ask_once_the_engine_is_there(server, f"/models/there/{action}")
        assert job.status_code == 202, job.text
        where = job.headers["location"]
        wait_until(partial(has_ended, server, where), "the job has ended")
        assert server.get(where).json()["state"] == "done"
        assert version(server, "there")["state"] == state
    assert server.post("/predict/there", json=ROW).json()["outputs"]["sum"] == SUM
