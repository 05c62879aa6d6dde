"""A server with an engine for each of two cards, which are made up, and one for the CPU."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from inferpool.repository.remote_catalog import RESTARTING

from tests.chaos.inferpool_chaos import open_gate
from tests.engine.processes import children, name
from tests.engine.test_processes import ONE_WEB, ROW, SUM, Load
from tests.engine.test_several_engines import engines, has_ended, version
from tests.fake_gpu import LOSE
from tests.observe.prometheus import Prometheus, needs_prometheus
from tests.server import PATCHES, ROOT, Server, wait_until

CARDS = ("cuda:0", "cuda:1")


class Cards(NamedTuple):
    """A server of two cards. The model `m` is on both, `alone` on the second one, and `cpu` on none.

    Attributes:
        gate: the pipe at which loads of `m` wait if it is one.
        fallen: the folder in which a file named like a card makes loads of `m` fail there.
    """

    server: Server
    gate: Path
    fallen: Path

    def kill(self, card: str) -> None:
        """End the engine of a card."""
        os.kill(engines(self.server, "m")[card], signal.SIGKILL)

    def hold_loads(self) -> None:
        """Let loads of `m` wait until `open_gate` is called."""
        self.gate.unlink()
        os.mkfifo(self.gate)

    def wait_for_problems(self, **problems: str) -> None:
        """Wait until `/health` has these problems, by models, and no others."""
        expected = {f"{model}/1": text for model, text in problems.items()}
        wait_until(lambda: self.server.get("/health").json()["problems"] == expected, str(expected))

    def restarts(self) -> list[float]:
        """How often the engine of each card was replaced."""
        return [self.server.metric("engine_restarts_total", engine=card) for card in CARDS]

    def descriptors(self) -> list[tuple[str, int]]:
        """How many descriptors each process has, by the names of the processes.

        Connections of clients do not count: the server closes one a moment after its client.
        """
        pids = [self.server.process.pid, *children(self.server)]
        names = {pid: name(pid) for pid in pids}
        assert "inferpool-spare" in names.values()
        clients = _client_sockets(self.server.port)
        return sorted((names[pid], sum(target not in clients for target in _targets(pid))) for pid in pids)


def _targets(pid: int) -> list[str]:
    """What the descriptors of a process are."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found.append(str(link.readlink()))
    return found


def _client_sockets(port: int) -> set[str]:
    """The accepted connections of a server, as descriptors are called; its listening socket is none."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        f"socket:[{line[9]}]" for line in lines if int(line[1].split(":")[1], 16) == port and line[3] != "0A"
    }


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cards]:
    folder = tmp_path_factory.mktemp("cards")
    gate, fallen = folder / "gate", folder / "fallen"
    gate.touch()
    fallen.mkdir()
    for model, config, more in (
        ("m", "", {"gate": str(gate), "fails": str(fallen)}),
        ("alone", "[instances]\ndevices = ['cuda:1']\n", {"cpu_nodes": {"Unique": 1}}),
        ("cpu", "[instances]\ndevices = ['cpu']\n", {}),
    ):
        (folder / "repository" / model / "1").mkdir(parents=True)
        (folder / "repository" / model / "model.toml").write_text(config)
        file = folder / "repository" / model / "1" / "model.fakegpu"
        file.write_text(json.dumps({"run_ms": 2, **more}))
    server = Server(
        folder / "repository",
        [*ONE_WEB, "--admin-routes", "on", "--required-models", "m,cpu"],
        {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fake_gpu'}:{PATCHES}",
            "INFERPOOL_CACHE_DIR": str(folder / "cache"),
            "INFERPOOL_MEASURE_MS": "0",
        },
        "tests.servers.fake_gpus",
    )
    server.wait_loaded()
    yield Cards(server, gate, fallen)
    server.kill()


def test_each_card_has_an_engine_and_requests_spread_over_both(cards: Cards) -> None:
    server = cards.server
    assert {model: list(engines(server, model)) for model in ("m", "alone", "cpu")} == {
        "m": [*CARDS],
        "alone": ["cuda:1"],
        "cpu": ["cpu"],
    }
    load = Load(server, clients=4)
    asyncio.run(load.run(load.answered(50)))
    assert set(load.statuses) == {200}
    busy = [server.metric("instance_busy_seconds_total", model="m", device=card) for card in CARDS]
    assert min(busy) > 0.2 * sum(busy)


def test_while_the_engine_of_a_card_is_replaced_the_other_one_answers(cards: Cards) -> None:
    server = cards.server
    load, on_cpu = Load(server, clients=4), Load(server, "cpu", clients=1)
    wait_until(lambda: "inferpool-spare" in map(name, children(server)), "there is a spare engine")
    before, cpu = cards.descriptors(), engines(server, "cpu")

    async def replace(card: str) -> None:
        cards.hold_loads()
        await load.answered(20)
        await asyncio.to_thread(cards.kill, card)
        only_there = {} if card == "cuda:0" else {"alone": RESTARTING}
        await asyncio.to_thread(cards.wait_for_problems, m=f"{card}: {RESTARTING}", **only_there)
        assert server.get("/health/ready").status_code == 200
        assert server.metric("missing_engines", model="m", engine=card) == 1
        assert server.metric("instances", model="m", state="ready") == 2
        await load.answered(50)
        await asyncio.to_thread(open_gate, cards.gate)
        await asyncio.to_thread(cards.wait_for_problems)
        assert server.metric("missing_engines") == 0
        assert server.metric("instances", model="m", state="ready") == 4

    async def replace_each() -> None:
        for card in CARDS:
            await replace(card)

    async def both() -> None:
        await asyncio.gather(load.run(replace_each()), on_cpu.run(load_ends()))

    async def load_ends() -> None:
        await asyncio.to_thread(wait_until, lambda: cards.restarts() == [1, 1], "both were replaced")

    asyncio.run(both())
    assert set(load.statuses) == {200} == set(on_cpu.statuses)
    assert load.lost == on_cpu.lost == 0
    assert cards.restarts() == [1, 1]
    assert engines(server, "cpu") == cpu
    wait_until(lambda: "inferpool-spare" in map(name, children(server)), "there is a spare engine again")
    wait_until(lambda: cards.descriptors() == before, f"there are as many descriptors as before: {before}")


def test_a_card_that_does_not_come_back_is_told_and_loaded_again_when_it_is_mended(cards: Cards) -> None:
    server = cards.server
    (cards.fallen / "cuda:1").touch()
    cards.kill("cuda:1")
    cards.wait_for_problems(m="cuda:1: cuda:1 has fallen off the bus")
    assert server.get("/health/ready").status_code == 200
    assert server.metric("missing_engines", model="m", engine="cuda:1") == 1
    assert list(engines(server, "m")) == ["cuda:0"]
    assert server.post("/predict/m", json=ROW).json()["outputs"]["sum"] == SUM
    assert act(server, "load", "m")["reason"] == "cuda:1 has fallen off the bus"
    (cards.fallen / "cuda:1").unlink()
    assert act(server, "load", "m")["state"] == "done"
    assert sorted(engines(server, "m")) == [*CARDS]
    cards.wait_for_problems()


@needs_prometheus
def test_an_engine_that_is_missing_and_nodes_on_the_cpu_have_their_alerts(
    cards: Cards, tmp_path: Path
) -> None:
    server = cards.server
    (cards.fallen / "cuda:1").touch()
    cards.kill("cuda:1")
    with Prometheus(tmp_path, f"127.0.0.1:{server.port}") as prometheus:
        prometheus.wait_for_alert("InferpoolGpuFallback", model="alone")
        prometheus.wait_for_alert("InferpoolEngineMissing", model="m", engine="cuda:1")
        assert not prometheus.has('ALERTS{alertname="InferpoolGpuFallback",model!="alone"}')
    (cards.fallen / "cuda:1").unlink()
    assert act(server, "load", "m")["state"] == "done"
    cards.wait_for_problems()


def test_a_fault_of_a_card_ends_its_engine_and_no_other(cards: Cards) -> None:
    server = cards.server
    before, pids = cards.restarts(), engines(server, "m")
    answer = server.post("/predict/m", json={"inputs": [[LOSE, 0, 0, 0]]})
    assert (answer.status_code, answer.json()["code"]) == (500, "model_crashed")
    ended = [now - then for now, then in zip(cards.restarts(), before, strict=True)]
    assert sorted(ended) == [0, 2]
    cards.wait_for_problems()
    other = CARDS[ended.index(0)]
    assert engines(server, "m")[other] == pids[other]


def test_what_is_unloaded_while_an_engine_is_replaced_stays_unloaded(cards: Cards) -> None:
    server = cards.server
    alone = engines(server, "alone")
    cards.kill("cuda:1")
    assert act(server, "unload", "m")["state"] == "done"
    wait_until(lambda: engines(server, "alone") != alone, "the engine is replaced")
    cards.wait_for_problems()
    assert (version(server, "m")["state"], version(server, "m")["instances"]) == ("unloaded", [])
    assert act(server, "load", "m")["state"] == "done"
    assert sorted(engines(server, "m")) == [*CARDS]


def act(server: Server, action: str, model: str) -> dict[str, Any]:
    """The job of an administrator's action, once it has ended; it is asked for until all engines can."""
    answers: list[httpx.Response] = []

    def is_taken() -> bool:
        answers.append(server.post(f"/models/{model}/{action}", json={"version": 1}))
        return answers[-1].status_code != 503

    wait_until(is_taken, "all engines can")
    assert answers[-1].status_code == 202, answers[-1].text
    job = answers[-1].headers["location"]
    wait_until(lambda: has_ended(server, job), "the job has ended")
    return dict(server.get(job).json())
