"""Metrics, statistics and logs of a server of several processes are those of the whole server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from inferpool.observe import logs
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client
from tests.conftest import MakeChaos, Serve
from tests.engine.processes import ENGINE, WEB, find
from tests.server import ROOT, Server, wait_until

PROCESS = ("--engine", "process", "--web-processes", "2")
ROW = json.dumps({"inputs": [[1, 2, 3, 4], [1, 2, 3, 5]]}).encode()
WRONG = json.dumps({"inputs": [[1]]}).encode()
RESTARTS: list[tuple[str, ...]] = [
    ("inferpool_web_restarts_total",), ("inferpool_engine_restarts_total", "cpu"),
]  # fmt: skip
COUNTERS = re.compile(r"_(total|count|bucket|sum)$")


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the model `waiting` wait for it if their row says so."""
    gate = tmp_path_factory.mktemp("gate") / "gate"
    os.mkfifo(gate)
    return gate


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos, gate: Path) -> Server:
    """A server of several processes, with a model for each test."""
    for name in ("counted", "killed", "crashing"):
        module_make_chaos(name)
    return module_serve(module_make_chaos("waiting", run_gate=str(gate)), *PROCESS, "--access-log")


async def ask(server: Server, model: str, good: int, wrong: int, clients: int = 32) -> None:
    """Send requests over connections of both web processes; each has been answered at the end."""
    # The second process may start later than the server is ready; each has a line about its memory then.
    both = {"web-1", "web-2"}
    wait_until(lambda: both <= {line.get("process") for line in server.log}, "both web processes serve")
    connected = [await Client.connect(server.port) for _ in range(clients)]
    # Connections spread as they are accepted, so each sends a request first.
    path = f"/predict/{model}"
    for client in connected:
        assert (await client.post(path, ROW)).status == 200
    for number in range(good - clients):
        assert (await connected[number % clients].post(path, ROW)).status == 200
    for number in range(wrong):
        assert (await connected[number % clients].post(path, WRONG)).status == 422
    for client in connected:
        await client.close()


def counters(server: Server) -> dict[tuple[str, ...], float]:
    """Every counter of the server, by name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse_text(server.get("/metrics").text)
        for sample in family.samples
        if family.type in ("counter", "histogram") and COUNTERS.search(sample.name)
    }


def each_web(server: Server, read: Callable[[], object], times: int = 12) -> list[object]:
    """What `read` finds over connections that are spread over the web processes."""
    return [read() for _ in range(times)]


def test_counters_are_those_of_the_clients_whichever_process_answers(server: Server) -> None:
    asyncio.run(ask(server, "counted", 100, 30))

    def counts() -> tuple[float, ...]:
        return (
            server.metric("requests_total", model="counted", code="200"),
            server.metric("requests_total", model="counted", code="422"),
            server.metric("request_duration_seconds_count", model="counted"),
            server.metric("queue_duration_seconds_count", model="counted"),
            server.metric("batch_rows_sum", model="counted"),
        )

    assert set(each_web(server, counts)) == {(100, 30, 130, 100, 200)}

    # Both have answered requests, so no process can know the sums alone.
    def lines() -> list[str]:
        return [line["process"] for line in server.log if line.get("model") == "counted"]

    wait_until(lambda: len(lines()) >= 130, "all lines")
    assert len(lines()) == 130
    assert set(lines()) == {"web-1", "web-2"}
    assert {line["process"] for line in server.log} == {
        "supervisor",
        "engine cpu",
        "web-1",
        "web-2",
    }
    busy = {
        labels[-1]: value
        for labels, value in counters(server).items()
        if "web_busy_seconds_total" in labels[0]
    }
    assert set(busy) == {"web-1", "web-2"}
    assert min(busy.values()) > 0

    def stats() -> tuple[object, ...]:
        (found,) = server.get("/v2/models/counted/stats").json()["model_stats"]
        inference = found["inference_stats"]
        return (
            found["inference_count"], found["execution_count"] > 0, inference["success"]["count"],
            inference["fail"]["count"], found["last_inference"] > 1000 * (time.time() - 600),
            sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in found["batch_stats"]),
        )  # fmt: skip

    assert set(each_web(server, stats)) == {(200, True, 100, 30, True, 200)}

    def status() -> tuple[object, ...]:
        [model] = [model for model in server.get("/status").json()["models"] if model["name"] == "counted"]
        figures = model["versions"][0]["figures"]
        return (
            figures["requests"], sum(figures["duration"]["counts"]), sum(figures["reasons"].values()) > 0,
            sum(line["rows"] * line["runs"] for line in figures["batches"]),
        )  # fmt: skip

    told = each_web(server, status)
    assert all(each == ({"200": 100, "422": 30}, 130, True, 200) for each in told), told


def test_gauges_are_those_of_all_processes(server: Server, gate: Path) -> None:
    """Requests that one web process holds are seen by the other; memory and descriptors are of all."""

    async def hold() -> None:
        clients = [await Client.connect(server.port) for _ in range(6)]
        body = json.dumps({"inputs": [[chaos.WAIT, 2, 3, 4]]}).encode()
        asked = [asyncio.create_task(client.post("/predict/waiting", body)) for client in clients]

        def seen() -> bool:
            return set(each_web(server, lambda: server.metric("in_flight_requests"), 6)) == {6.0}

        try:
            await asyncio.to_thread(wait_until, seen, "every process tells all requests")
        finally:
            while not all(task.done() for task in asked):
                # A run waits for each opening.
                with contextlib.suppress(OSError):
                    os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
                await asyncio.sleep(0.01)
            for client in clients:
                await client.close()

    asyncio.run(hold())
    # Each process publishes its own part once a second.
    server.wait_for_metric("shared_memory_bytes", at_least=2 * 4096)
    text = server.get("/metrics").text
    found = {sample.name: sample.value for family in parse_text(text) for sample in family.samples}
    assert found["process_open_fds"] > 60
    assert found["process_resident_memory_bytes"] > 50e6
    assert found["process_cpu_seconds_total"] > 1
    assert found["inferpool_shared_memory_bytes"] > 4096
    assert not [name for name in found if name.startswith("python_gc")]


def test_crashes_and_replays_are_counted(server: Server) -> None:
    before = server.metric("engine_restarts_total", engine="cpu")
    assert server.metric("replayed_entries_total", model="crashing") == 0
    reply = server.post("/predict/crashing", json={"inputs": [[chaos.CRASH, 0, 0, 0]]})
    assert (reply.status_code, reply.json()["code"]) == (500, "model_crashed")
    assert server.metric("replayed_entries_total", model="crashing") == 1
    assert server.metric("crashed_entries_total", model="crashing") == 1
    wait_until(lambda: server.metric("engine_restarts_total", engine="cpu") == before + 2, "two restarts")


def test_no_counter_goes_back_when_processes_are_killed(server: Server) -> None:
    asyncio.run(ask(server, "killed", 60, 10))
    before = counters(server)
    restarts = [before.get(name, 0.0) for name in RESTARTS]
    stats = server.get("/v2/models/killed/stats").json()["model_stats"][0]
    assert before["inferpool_requests_total", "killed", "1", "200"] == 60
    for round_ in (1, 2):
        web, engine = find(server, WEB), find(server, ENGINE)
        killed = {web[0], engine[0]}
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

        def back(killed: set[int] = killed) -> bool:
            living = find(server, WEB)
            return (
                len(living) == 2
                and not killed & {*living, *find(server, ENGINE)}
                and server.get("/health/ready").status_code == 200
                and server.get("/metrics").is_success
            )

        wait_until(partial(_is_true, back), "the server is whole again")
        asyncio.run(ask(server, "killed", 40, 5))
        for _ in range(8):
            after = counters(server)
            fell = {name: (value, after.get(name)) for name, value in before.items()
                    if after.get(name, -1.0) < value}  # fmt: skip
            assert not fell
        assert after["inferpool_requests_total", "killed", "1", "200"] == 60 + 40 * round_
        assert after["inferpool_requests_total", "killed", "1", "422"] == 10 + 5 * round_
        assert after["inferpool_batch_rows_sum", "killed", "1"] == 2 * (60 + 40 * round_)
        assert [after[name] for name in RESTARTS] == [count + round_ for count in restarts]
        before = after
    later = server.get("/v2/models/killed/stats").json()["model_stats"][0]
    assert later["inference_count"] == stats["inference_count"] + 160
    assert later["execution_count"] >= stats["execution_count"] + 2
    assert later["inference_stats"]["fail"]["count"] == 20


def _is_true(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds; a web process that is killed meanwhile cannot tell."""
    try:
        return condition()
    except Exception:  # noqa: BLE001 - of whatever library
        return False


WRITER = """
import logging, sys
from inferpool.observe.logs import configure_logs
configure_logs("info", "json", process=sys.argv[1])
for number in range(60):
    logging.info(sys.argv[1] * (20_000 if number % 3 else 10))
"""


def test_lines_of_several_processes_stay_whole() -> None:
    """Lines that are longer than a pipe takes at once are not mixed with those of other processes."""
    reader, writer = os.pipe()
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER, name], stderr=writer, cwd=ROOT) for name in "abc"
    ]
    os.close(writer)
    with os.fdopen(reader) as stream:
        lines = [json.loads(line) for line in stream]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert len(lines) == 180
    assert all(set(line["message"]) == {line["process"]} for line in lines)


@pytest.mark.parametrize("process", ["", "web-1"])
def test_lines_name_their_process(process: str) -> None:
    line = logs.LogLine(0.0, "INFO", "inferpool", "hello", {"rows": 3})
    assert json.loads(logs.JsonFormatter(process).text(line)).get("process", "") == process
    said = f"{process}: hello" if process else "hello"
    assert logs.ConsoleFormatter(process).text(line).endswith(f"INFO     {said} rows=3")
