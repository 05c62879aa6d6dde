"""Servers whose memory the kernel limits: they refuse what they have no memory for, and are not killed."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.inferpool_chaos import HUNGRY
from tests.clients import Client, with_clients
from tests.conftest import MakeChaos
from tests.limited import LimitedServer, missing
from tests.observe.prometheus import Prometheus, needs_prometheus
from tests.server import wait_until

MIB = 2**20
DIGITS = Path(__file__).parents[3] / "models" / "digits"
NPY = {"content-type": "application/x-npy", "accept": "application/x-npy"}
Limited = Callable[..., LimitedServer]
MISSING = missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"limiting memory needs {MISSING}")


@pytest.fixture
def limited(cache_dir: Path) -> Iterator[Limited]:
    """Start servers: `limited(repository, memory_bytes, *flags)`; they are stopped after the test."""
    servers: list[LimitedServer] = []

    def start(repository: Path, memory_bytes: int, *flags: str) -> LimitedServer:
        environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
        servers.append(LimitedServer(repository, memory_bytes, flags, environ))
        servers[-1].wait_loaded()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def npy(rows: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((rows, 1, 8, 8), np.float32))
    return stream.getvalue()


def post_all(server: LimitedServer, count: int, body: bytes, headers: Mapping[str, str]) -> Counter[int]:
    """Post `body` from `count` clients at once; the statuses of the answers."""
    statuses: Counter[int] = Counter()

    async def work(client: Client, number: int) -> None:
        reply = await client.post("/predict/digits", body, headers)
        statuses[reply.status] += 1

    asyncio.run(with_clients(server.port, count, work))
    return statuses


def check_alive(server: LimitedServer) -> None:
    """The kernel has killed nothing, and the server answers."""
    assert server.kills() == 0
    assert server.process.poll() is None
    answer = server.post("/predict/digits", content=npy(2), headers=NPY)
    assert answer.status_code == 200, answer.text


def test_twelve_uploads_of_60_mb_to_512_mib_are_refused_and_kill_nothing(limited: Limited) -> None:
    server = limited(DIGITS, 512 * MIB)
    idle = server.held_bytes()
    for _ in range(2):
        statuses = post_all(server, 12, npy(60 * 10**6 // 256), NPY)
        assert sum(statuses.values()) == 12, "every client has an answer"
        assert set(statuses) <= {200, 429, 503}, statuses
        assert statuses[503] >= 6
        check_alive(server)
    assert server.metric("in_flight_limit_bytes") < 240 * MIB
    assert server.metric("memory_limit_bytes") == 512 * MIB
    wait_until(lambda: server.held_bytes() < idle + 100 * MIB, "the memory of the burst is given back", 60)


@pytest.mark.parametrize("kind", ["npy", "JSON"])
def test_256_mib_serve_digits_under_uploads(limited: Limited, kind: str) -> None:
    server = limited(DIGITS, 256 * MIB, "--engine", "process")
    body, headers = npy(20 * 10**6 // 256), NPY
    if kind == "JSON":
        row = json.dumps(np.full((1, 8, 8), 0.5).tolist())
        body = f'{{"inputs": [{", ".join([row] * (20 * 10**6 // len(row)))}]}}'.encode()
        headers = {"content-type": "application/json"}
    for _ in range(2):
        statuses = post_all(server, 12, body, headers)
        assert sum(statuses.values()) == 12
        assert set(statuses) <= {200, 413, 429, 503}, statuses
        check_alive(server)


def test_bodies_that_are_announced_and_do_not_come_take_no_memory_from_others(limited: Limited) -> None:
    server = limited(DIGITS, 256 * MIB)

    async def stay(client: Client, number: int) -> None:
        # Enough of the body for the server to prepare memory for the rest.
        client._writer.write(
            b"POST /predict/digits HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-npy\r\n"
            b"content-length: 30000000\r\n\r\n" + bytes(20_000)
        )
        await client._writer.drain()
        await announced.wait()

    async def scenario() -> None:
        clients = asyncio.create_task(with_clients(server.port, 40, stay))
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 40)
        await asyncio.to_thread(check_alive, server)
        announced.set()
        await clients

    announced = asyncio.Event()
    asyncio.run(scenario())
    assert server.kills() == 0


def test_a_model_that_needs_more_memory_than_there_is_fails_one_request(
    limited: Limited, make_chaos: MakeChaos
) -> None:
    server = limited(make_chaos("m"), 256 * MIB)
    hungry = {"inputs": [[HUNGRY, 1000.0, 0.0, 0.0]]}  # in MiB
    for _ in range(3):
        answer = server.post("/predict/m", json=hungry)
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded"), answer.text
        assert "memory ran out while the model ran this request" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) >= 1
        assert server.post("/predict/m", json={"inputs": [[1.0, 2.0, 3.0, 4.0]]}).status_code == 200
    assert server.kills() == 0
    assert server.get("/health").json()["status"] == "ok"


def test_a_body_that_never_has_room_is_413(limited: Limited) -> None:
    server = limited(DIGITS, 160 * MIB)
    answer = server.post("/predict/digits", content=npy(60 * 10**6 // 256), headers=NPY)
    assert answer.status_code == 413, answer.text
    assert answer.json()["limit"] < 60 * 10**6
    check_alive(server)


@needs_prometheus
def test_an_alert_fires_before_the_memory_is_used_up(limited: Limited, tmp_path: Path) -> None:
    """A process beside the server takes what the alert leaves free, and the server still answers."""
    server = limited(DIGITS, 256 * MIB)
    take = int(0.94 * 256 * MIB - server.metric("memory_held_bytes"))
    with Prometheus(tmp_path, f"127.0.0.1:{server.port}") as prometheus, server.beside(take):
        prometheus.wait_for_alert("InferpoolMemoryHigh")
        check_alive(server)
