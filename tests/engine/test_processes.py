"""The processes of a server: what each one loads, and what happens when one ends."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, with_clients
from tests.conftest import WITH_SPARE, MakeChaos, Serve, chaos_in
from tests.engine.processes import ENGINE, WEB, children, find, libraries, lives, open_sockets
from tests.server import ROOT, START_S, Server, wait_until

PROCESS = ("--engine", "process", "--web-processes", "2")
ONE_WEB = ("--engine", "process", "--web-processes", "1")
"""For tests to which a second web process, whose start takes a second of CPU time, makes no difference."""
ROW = {"inputs": [[1, 2, 3, 4]]}
WAITING_ROW = {"inputs": [[chaos.WAIT, 2, 3, 4]]}
SUM = [31.0]


WITH_ROUTES = "fastapi starlette email_validator opentelemetry prometheus_client"
"""What the routes that are no predictions need."""
PAUSE_S = 0.02
"""A client's pause between two requests, which leaves the cores to the processes that start meanwhile."""


class Load:
    """Clients that ask for sums until they are told to stop, and check each answer."""

    def __init__(self, server: Server, model: str = "m", clients: int = 8) -> None:
        self.statuses: Counter[int] = Counter()
        self.lost = 0
        self._server = server
        self._model = model
        self._clients = clients
        self._ends = False

    async def run(self, meanwhile: object) -> None:
        """Ask while the coroutine `meanwhile` runs."""
        work = asyncio.create_task(with_clients(self._server.port, self._clients, self._ask))
        try:
            await meanwhile  # type: ignore[misc]
        finally:
            self._ends = True
        await work

    async def answered(self, more: int) -> None:
        """Wait until `more` requests have been answered from now on."""
        goal = self.statuses.total() + more
        await asyncio.to_thread(wait_until, lambda: self.statuses.total() >= goal, f"{more} more answers")

    async def _ask(self, client: Client, number: int) -> None:
        rng = np.random.default_rng(number)
        again: Client | None = None
        while not self._ends:
            rows = rng.integers(0, 9, (rng.integers(1, 4), 4)).astype(float)
            body = json.dumps({"inputs": rows.tolist()}).encode()
            try:
                reply = await (again or client).post(f"/predict/{self._model}", body)
            except (asyncio.IncompleteReadError, ConnectionError):
                self.lost += 1
                if again is not None:
                    await again.close()
                again = await Client.connect(self._server.port)
                continue
            self.statuses[reply.status] += 1
            if reply.status == 200:
                assert json.loads(reply.body)["outputs"]["sum"] == chaos.expected(rows).tolist()
            await asyncio.sleep(PAUSE_S)
        if again is not None:
            await again.close()


@pytest.fixture(scope="module")
def shared(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    """A server whose processes the tests kill: it is whole again after each of them.

    Each test has a model of its own, because crashes are counted for all models that run at that time.
    """
    for name in ("killed", "crashing", "lost", "alive"):
        module_make_chaos(name, run_ms=2)
    return module_serve(module_make_chaos("wide", row=[40_000], run_ms=2), *PROCESS, **WITH_SPARE)


def test_connections_spread_over_web_processes(shared: Server) -> None:
    web = find(shared, WEB)
    idle = [open_sockets(pid) for pid in web]

    async def connect() -> list[int]:
        clients = [await Client.connect(shared.port) for _ in range(32)]
        # Every connection is accepted once it has an answer.
        for client in clients:
            assert (await client.post("/predict/alive", json.dumps(ROW).encode())).status == 200
        shares = [open_sockets(pid) - before for pid, before in zip(web, idle, strict=True)]
        assert sum(shares) == 32
        for client in clients:
            await client.close()
        return shares

    # Both take turns by the millisecond. A busy machine may favour one for a round, and not for eight.
    rounds = []
    for _ in range(8):
        wait_until(lambda: [open_sockets(pid) for pid in web] == idle, "earlier connections are closed")
        rounds.append(asyncio.run(connect()))
    assert min(map(sum, zip(*rounds, strict=True))) >= 8 * 12, rounds


class Gated(NamedTuple):
    """A server, and the pipe for which something waits there."""

    server: Server
    gate: Path


@pytest.fixture(scope="module")
def of_two_backends(module_serve: Serve, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """A server of `diabetes`, and of a model `m` whose marked runs wait for the gate."""
    folder = tmp_path_factory.mktemp("of_two_backends")
    gate = folder / "gate"
    os.mkfifo(gate)
    repository = chaos_in(folder / "repository")("m", run_gate=str(gate))
    (repository / "diabetes").symlink_to(models / "diabetes", target_is_directory=True)
    return Gated(module_serve(repository, *ONE_WEB), gate)


@pytest.fixture(scope="module")
def held(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """A server whose model `m` the tests load again: the loads wait once they make a pipe of the gate.

    Marked runs of the model `endless` have no end. The time for draining is short.
    """
    folder = tmp_path_factory.mktemp("held")
    gate, closed = folder / "gate", folder / "closed"
    gate.touch()
    os.mkfifo(closed)
    make = chaos_in(folder / "repository")
    make("endless", run_gate=str(closed))
    flags = (*ONE_WEB, "--admin-routes", "on", "--drain-timeout-s", "1")
    return Gated(module_serve(make("m", gate=str(gate)), *flags), gate)


def test_every_route_answers_and_each_process_loads_only_its_own_libraries(of_two_backends: Gated) -> None:
    server = of_two_backends.server
    assert server.post("/predict/diabetes", json={"inputs": [[0.1] * 10]}).status_code == 200
    assert server.get("/health").json()["status"] == "ok"
    assert server.get("/v2/models/diabetes").json()["name"] == "diabetes"
    assert [model["name"] for model in server.get("/models").json()["models"]] == ["diabetes", "m"]
    assert server.metric("requests_total", model="diabetes", code="200") == 1
    assert server.metric("model_state", model="diabetes", state="ready") == 1
    assert server.metric("instances", model="diabetes") >= 1
    web, engine = find(server, WEB), find(server, ENGINE)
    assert (len(web), len(engine)) == (1, 1)
    for pid in web:
        assert not libraries(pid) & {"onnxruntime", "torch"}
    assert "onnxruntime" in libraries(engine[0])
    assert not libraries(engine[0]) & {"uvloop", "httptools"}
    assert not libraries(server.process.pid) & {"numpy", "pydantic_core", "onnxruntime", "uvloop"}


@pytest.mark.parametrize(
    "mains",
    [
        # The later ones may have what the earlier ones have not.
        {
            "inferpool.engine.supervisor": "onnxruntime torch numpy fastapi uvicorn pydantic",
            # The supervisor begins as this, and starts its children afterwards.
            "inferpool.launch": "onnxruntime torch numpy fastapi prometheus_client asyncio",
            # The command blocks signals for its start in the threads that it has; numpy starts some.
            "inferpool.cli": "onnxruntime torch numpy fastapi prometheus_client asyncio",
        },
        {
            # The first request for another route than predictions imports the routes, and FastAPI if needed.
            "inferpool.web_process": "onnxruntime torch PIL inferpool.repository.repository " + WITH_ROUTES,
            # The first model that takes pictures imports Pillow.
            "inferpool.app": "onnxruntime torch PIL " + WITH_ROUTES,
        },
        {"inferpool.engine_process": "PIL fastapi uvicorn starlette prometheus_client asyncio"},
    ],
    ids=["supervisor", "web process", "engine"],
)
def test_mains_import_nothing_that_others_need(mains: dict[str, str]) -> None:
    code = (
        "import importlib, sys\n"
        f"for module, unwanted in {mains!r}.items():\n"
        "    importlib.import_module(module)\n"
        "    print(module, *set(unwanted.split()) & set(sys.modules), file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.stderr.splitlines() == list(mains)


def test_an_engine_that_is_killed_under_load_fails_no_request(shared: Server) -> None:
    load = Load(shared, "killed")
    before = shared.metric("engine_restarts_total")

    async def kill_twice() -> None:
        for _ in range(2):
            await load.answered(50)
            (pid,) = await asyncio.to_thread(find, shared, ENGINE)
            os.kill(pid, signal.SIGKILL)
            await load.answered(50)

    asyncio.run(load.run(kill_twice()))
    assert set(load.statuses) == {200}
    assert load.lost == 0
    assert shared.metric("engine_restarts_total") == before + 2
    assert shared.get("/health/ready").status_code == 200


def test_a_request_that_crashes_its_engine_twice_is_refused_and_others_are_answered(shared: Server) -> None:
    load = Load(shared, "crashing")

    async def poison() -> None:
        await load.answered(50)
        client = await Client.connect(shared.port)
        body = json.dumps({"inputs": [[chaos.CRASH, 0, 0, 0]]}).encode()
        reply = await client.post("/predict/crashing", body)
        assert (reply.status, json.loads(reply.body)["code"]) == (500, "model_crashed")
        await client.close()
        await load.answered(50)

    asyncio.run(load.run(poison()))
    assert set(load.statuses) == {200}
    assert load.lost == 0
    (line,) = [line for line in shared.log if re.search("crashing/1 .* request .* twice", line["message"])]
    assert str(chaos.CRASH) not in line["message"]


def test_an_engine_that_has_lost_its_device_ends_and_fails_no_other_request(shared: Server) -> None:
    """As after a fault on a GPU: every later call of the process fails, so that another one has to run."""
    load = Load(shared, "lost")
    before = shared.metric("engine_restarts_total")

    async def lose() -> None:
        await load.answered(50)
        client = await Client.connect(shared.port)
        reply = await client.post("/predict/lost", json.dumps({"inputs": [[chaos.LOSE, 0, 0, 0]]}).encode())
        assert (reply.status, json.loads(reply.body)["code"]) == (500, "model_crashed")
        await client.close()
        await load.answered(50)

    asyncio.run(load.run(lose()))
    assert set(load.statuses) == {200}
    assert load.lost == 0
    assert shared.metric("engine_restarts_total") == before + 2
    assert any("cpu is lost: an earlier run has broken it" in line["message"] for line in shared.log)


def test_large_binary_bodies_are_answered_whatever_engine_reads_them(shared: Server) -> None:
    rows = np.random.default_rng(1).integers(0, 9, (3, 40_000)).astype(np.float32)
    fields = {
        "name": "x",
        "datatype": "FP32",
        "shape": rows.shape,
        "parameters": {"binary_data_size": rows.nbytes},
    }
    header = json.dumps({"inputs": [fields]}).encode()
    array = io.BytesIO()
    np.save(array, rows)
    length = ("inference-header-content-length", str(len(header)))
    bodies = [
        ("/v2/models/wide/infer", dict([length]), header + rows.tobytes()),
        ("/v2/models/wide/infer", {length[0]: "0"}, rows[:1].tobytes()),
        ("/predict/wide", {"content-type": "application/x-npy"}, array.getvalue()),
    ]

    async def ask(client: Client, number: int) -> None:
        for turn, (path, headers, body) in enumerate(bodies * 5):
            if (number, turn) == (0, 4):
                os.kill(find(shared, ENGINE)[0], signal.SIGKILL)
            reply = await client.post(path, body, headers)
            assert reply.status == 200, reply.body
            if path == "/predict/wide":
                found = json.loads(reply.body)["outputs"]["sum"]
            elif length[0] in reply.headers:
                found = np.frombuffer(reply.body[int(reply.headers[length[0]]) :]).tolist()
            else:
                found = json.loads(reply.body)["outputs"][0]["data"]
            assert len(found) >= 1
            assert found == chaos.expected(rows).tolist()[: len(found)]

    asyncio.run(with_clients(shared.port, 4, ask))


def test_a_web_process_that_is_killed_costs_only_its_own_clients(shared: Server) -> None:
    load = Load(shared, "alive")
    before = find(shared, WEB)

    async def kill() -> None:
        await load.answered(50)
        before.sort(key=open_sockets)  # the last one has most clients
        os.kill(before[1], signal.SIGKILL)
        await asyncio.to_thread(
            wait_until, lambda: len(set(find(shared, WEB)) - {before[1]}) == 2, "there is another web process"
        )
        await load.answered(50)
        assert before[0] in find(shared, WEB)

    asyncio.run(load.run(kill()))
    assert set(load.statuses) == {200}
    # A client loses one connection at most.
    assert 1 <= load.lost <= 8
    assert shared.metric("web_restarts_total") == 1


def test_everything_ends_with_the_supervisor(shared: Server) -> None:
    """The last test of this server."""
    pids = children(shared)
    assert len(pids) >= 3  # a spare engine may have started, too
    shared.process.kill()
    wait_until(lambda: not any(map(lives, pids)), "all children end")


def test_a_run_that_does_not_stop_ends_its_engine_and_fails_no_other_request(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    make_chaos("other")
    server = serve(make_chaos("m", run_ms=2, run_gate=str(gate)), *ONE_WEB, "--run-timeout-s", "2")
    load = Load(server)

    async def hang() -> None:
        await load.answered(50)
        client = await Client.connect(server.port)
        body = json.dumps({**WAITING_ROW, "parameters": {"timeout_ms": 300}}).encode()
        reply = await client.post("/predict/m", body)
        assert (reply.status, json.loads(reply.body)["code"]) == (504, "deadline_exceeded")
        await client.close()
        await load.answered(50)

    asyncio.run(load.run(hang()))
    assert set(load.statuses) == {200}
    assert load.lost == 0
    # Another instance may have answered them before this run counts as hung.
    server.wait_for_metric("engine_restarts_total", at_least=1)
    server.wait_for("ended with status 70")
    assert any("engine cpu ends: m/1: 1 of " in line["message"] for line in server.log)
    assert server.post("/predict/other", json=ROW).json()["outputs"]["sum"] == SUM
    assert server.stop() == 0


def test_a_web_process_that_starts_while_the_engine_loads_keeps_requests_for_it(held: Gated) -> None:
    server, gate = held
    before = find(server, WEB)
    gate.unlink()
    os.mkfifo(gate)  # the next load waits here
    for pid in (*find(server, ENGINE), *before):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(lives, before)), "the web process has ended")

    async def ask() -> None:
        client = await Client.connect(server.port)
        client.send("/predict/m", json.dumps(ROW).encode())
        health = await asyncio.to_thread(server.get, "/health")
        assert health.status_code == 503
        problems = dict.fromkeys(("endless/1", "m/1"), "its engine is being restarted")
        assert health.json()["problems"] == problems
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 1)
        await asyncio.to_thread(chaos.open_gate, gate)
        reply = await client.receive()
        assert (reply.status, json.loads(reply.body)["outputs"]) == (200, {"sum": SUM})
        await client.close()

    asyncio.run(ask())
    assert server.metric("web_restarts_total") == 1


def test_a_hangup_outlives_the_engine_that_was_to_look_and_what_an_admin_asked_is_refused(
    held: Gated,
) -> None:
    server, gate = held
    [engine] = find(server, ENGINE)
    os.kill(engine, signal.SIGSTOP)
    chaos_in(gate.with_name("repository"))("new")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("SIGHUP")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.post, "/models/m/load")
        for _ in range(10):
            assert server.get("/health/live").status_code == 200
        os.kill(engine, signal.SIGKILL)
        # Nearly always the question is with the engine that ends. Else its successor answers.
        assert asked.result().status_code in (503, 202)
    wait_until(lambda: server.post("/predict/new", json=ROW).status_code == 200, "the new model answers")


def test_the_second_signal_ends_everything_at_once(of_two_backends: Gated) -> None:
    """The last test of this server."""
    server = of_two_backends.server

    async def scenario() -> None:
        client = await Client.connect(server.port)
        client.send("/predict/m", json.dumps(WAITING_ROW).encode())
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 1)
        pids = children(server)
        server.process.terminate()
        await asyncio.to_thread(server.wait_for, "SIGTERM: draining")
        server.process.terminate()
        assert server.process.wait(10) == 1
        await client.close()
        await asyncio.to_thread(wait_until, lambda: not any(map(lives, pids)), "all children end")
        server.wait_for("SIGTERM: stopping at once")
        server.wait_for("stopped with status 1")

    asyncio.run(scenario())


def test_a_run_that_does_not_end_holds_up_the_end_no_longer_than_the_drain_timeout(held: Gated) -> None:
    """The last test of this server."""
    server = held.server

    async def scenario() -> None:
        client = await Client.connect(server.port)
        client.send("/predict/endless", json.dumps(WAITING_ROW).encode())
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 1)
        server.process.terminate()
        reply = await client.receive()
        assert (reply.status, json.loads(reply.body)["code"]) == (503, "draining")
        await client.close()
        assert await asyncio.to_thread(server.process.wait, 60) == 1

    asyncio.run(scenario())
    moments = {line["message"]: datetime.fromisoformat(line["time"]) for line in server.log}
    drained = moments["a model was still running when the drain timeout ended"] - moments["SIGTERM: draining"]
    assert 1 <= drained.total_seconds() < 30  # one for the requests, one for the model; the run has no end


def test_sigterm_while_an_engine_is_stuck_in_a_load_ends_with_the_usual_status(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    server = serve(make_chaos("m", gate=str(gate)), *ONE_WEB, wait=False)
    assert server.stop() == 0


def test_several_web_processes_need_engines_of_their_own() -> None:
    command = [sys.executable, "-m", "inferpool", "serve", "models", "--web-processes", "2"]
    environ = {name: text for name, text in os.environ.items() if name != "INFERPOOL_ENGINE"}
    run = subprocess.run(
        [*command, "--engine", "in-process"],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert run.returncode == 2
    assert "--engine process, or --web-processes 1" in run.stderr


def test_a_folder_without_models_is_refused_as_in_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "inferpool", "serve", str(tmp_path), "--port", "0", *ONE_WEB]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_S)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("inferpool: ")
    assert "holds no models" in run.stderr
