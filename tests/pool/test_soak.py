"""A soak: requests of random sizes, shapes, priorities, deadlines and departures, every answer checked."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter

import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client
from tests.conftest import MakeChaos, Serve

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "5000"))
"""Requests in all; `scripts/test --full` sends 100,000."""
CLIENTS = 48
MIB = 1024 * 1024


@pytest.mark.timeout(900)
def test_nothing_is_lost_crossed_or_leaked(serve: Serve, make_chaos: MakeChaos) -> None:
    repository = make_chaos("a", row=[-1], run_ms=0.3, row_ms=0.01, config="[batching]\nmax_rows = 16\n")
    make_chaos("b", row=[-1], row_ms=0.02, config="[instances]\ncount = 3\n")
    server = serve(repository, "--queue-ms", "200")
    seen: Counter[str] = Counter()
    sent = 0
    memory: list[int] = []

    async def client(number: int) -> None:
        nonlocal sent
        rng = random.Random(number)
        connection = await Client.connect(server.port)
        while sent < REQUESTS:
            sent += 1
            if sent % (REQUESTS // 20) == 0:
                memory.append(server.resident_bytes())
            count = rng.choice((1, 1, 1, 2, 3, 8, 40))
            width = rng.randint(1, 6)
            rows = [[rng.randint(0, 1000) for _ in range(width)] for _ in range(count)]
            poisoned = rng.random() < 0.01
            if poisoned:
                rows[rng.randrange(count)][0] = int(chaos.RAISE)
            document: dict[str, object] = {"inputs": rows, "id": f"{number}-{sent}"}
            parameters: dict[str, object] = {}
            if rng.random() < 0.3:
                parameters["priority"] = rng.randint(1, 9)
            if rng.random() < 0.3:
                parameters["timeout_ms"] = rng.choice((1, 5, 20, 200))
            if parameters:
                document["parameters"] = parameters
            connection.send(f"/predict/{rng.choice('ab')}", json.dumps(document).encode())
            if rng.random() < 0.02:
                await asyncio.sleep(0)
                await connection.close()
                connection = await Client.connect(server.port)
                seen["departed"] += 1
                continue
            reply = await connection.receive()
            answer = json.loads(reply.body)
            if reply.status == 200:
                assert answer["id"] == document["id"], "an answer is its own request's"
                assert not poisoned
                assert answer["outputs"]["sum"] == [3 * sum(row) + 1 for row in rows]
                seen["ok"] += 1
            else:
                code = answer["code"]
                assert code in ("model_failed", "deadline_exceeded", "queue_full"), answer
                assert (code == "model_failed") <= poisoned
                assert (code == "deadline_exceeded") <= ("timeout_ms" in parameters)
                seen[code] += 1
        await connection.close()

    async def soak() -> None:
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))

    asyncio.run(soak())
    assert sum(seen.values()) == sent >= REQUESTS
    assert seen["ok"] > REQUESTS / 2, seen
    for kind in ("model_failed", "deadline_exceeded", "departed"):
        assert seen[kind], seen
    # Requests of departed clients may still be running: a last request to each model comes after them.
    for model in "ab":
        answer = server.post(f"/predict/{model}", json={"inputs": [[1]], "parameters": {"priority": 99}})
        assert answer.json()["outputs"]["sum"] == [4.0]
    server.wait_for_metric("in_flight_requests", at_most=0)
    assert server.metric("queue_rows") == 0
    assert server.metric("requests_total", code="200") >= seen["ok"] + 2
    assert server.metric("requests_total", code="500") >= seen["model_failed"]
    second_half = memory[len(memory) // 2 :]
    assert max(second_half) - second_half[0] < 8 * MIB, [size // MIB for size in memory]
    assert server.stop() == 0
