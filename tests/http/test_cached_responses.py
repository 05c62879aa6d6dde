"""The response cache through the real door."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, Reply
from tests.conftest import Serve, chaos_in, in_both_engines
from tests.http.access.keys import KeyFile
from tests.server import Server, wait_until

pytestmark = in_both_engines

CACHED = "[cache]\nenabled = true\n[instances]\ncount = 1\n"
MISS, HIT, SHARED = "inferpool; fwd=miss", "inferpool; hit", "inferpool; fwd=miss; collapsed"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.toml")
    file.add("one", "predict", tenant="one")
    file.add("two", "predict", tenant="two")
    file.add("operator", "admin", "metrics", "read", tenant="operator")
    return file


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory, engine_variables: Mapping[str, str]) -> Path:
    path = tmp_path_factory.mktemp(engine_variables["INFERPOOL_ENGINE"]) / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module")
def server(
    module_serve: Serve, tmp_path_factory: pytest.TempPathFactory, keys: KeyFile, gate: Path
) -> Server:
    make = chaos_in(tmp_path_factory.mktemp("repository"))
    make("plain")
    repository = make("cached", CACHED, run_gate=str(gate))
    flags = ("--keys-file", str(keys.path))
    return module_serve(repository, *flags)


def body(*numbers: float, **rest: object) -> bytes:
    return json.dumps({"inputs": [[number, 0, 0, 0] for number in numbers], **rest}).encode()


def right(*numbers: float) -> list[float]:
    rows = np.zeros((len(numbers), 4))
    rows[:, 0] = numbers
    answer: list[float] = chaos.expected(rows).tolist()
    return answer


def metric(server: Server, keys: KeyFile, name: str, **labels: str) -> float:
    page = server.get("/metrics", headers=keys.bearer("operator")).text
    return sum(
        float(line.split()[-1])
        for line in page.splitlines()
        if line.startswith(f"inferpool_{name}") and all(f'{k}="{v}"' in line for k, v in labels.items())
    )


def ask(server: Server, headers: Mapping[str, str], content: bytes, model: str = "cached") -> httpx.Response:
    return server.post(f"/predict/{model}", content=content, headers=dict(headers))


def test_100_equal_requests_at_once_are_one_run(server: Server, keys: KeyFile, gate: Path) -> None:
    ran = metric(server, keys, "batch_rows_sum", model="cached")

    async def one(number: int) -> Reply:
        client = await Client.connect(server.port)
        try:
            headers = {**keys.bearer("one"), "x-request-id": f"r{number}"}
            return await client.post("/predict/cached", body(chaos.WAIT, 2, id=f"n{number}"), headers)
        finally:
            await client.close()

    async def all_at_once() -> list[Reply]:
        tasks = [asyncio.create_task(one(number)) for number in range(100)]
        await asyncio.to_thread(
            wait_until,
            lambda: metric(server, keys, "in_flight_requests") == 100,
            "100 requests wait",
        )
        await asyncio.to_thread(chaos.open_gate, gate)
        return list(await asyncio.gather(*tasks))

    replies = asyncio.run(all_at_once())
    for number, reply in enumerate(replies):
        answer = json.loads(reply.body)
        assert (reply.status, answer["outputs"]["sum"], answer["id"]) == (
            200,
            right(chaos.WAIT, 2),
            f"n{number}",
        )
        assert reply.headers["x-request-id"] == f"r{number}"
    told = [reply.headers["cache-status"] for reply in replies]
    assert (told.count(MISS), told.count(SHARED)) == (1, 99)
    assert metric(server, keys, "batch_rows_sum", model="cached") == ran + 2
    assert metric(server, keys, "tenant_rows_total", tenant="one") == 200
    assert metric(server, keys, "cache_requests_total", outcome="miss") == 1
    assert metric(server, keys, "cache_requests_total", outcome="shared") == 99


def test_a_tenant_is_never_answered_from_anothers_entries(server: Server, keys: KeyFile) -> None:
    told = [
        ask(server, keys.bearer(tenant), body(3)).headers["cache-status"]
        for tenant in ("one", "one", "one", "two", "two", "two")
    ]
    assert told == [MISS, MISS, HIT] * 2


def test_a_model_that_does_not_ask_for_it_is_not_cached(server: Server, keys: KeyFile) -> None:
    for _ in range(2):
        reply = ask(server, keys.bearer("one"), body(3), "plain")
        assert reply.status_code == 200
        assert "cache-status" not in reply.headers


def as_npy(number: float) -> bytes:
    file = BytesIO()
    np.save(file, np.array([[number, 0, 0, 0]], np.float32))
    return file.getvalue()


def test_no_spelling_of_a_request_gets_another_ones_answer(server: Server, keys: KeyFile) -> None:
    """Each form is sent with other rows, and with equal ones, whose answers are in the cache."""
    for _ in range(2):
        ask(server, keys.bearer("one"), body(5)).raise_for_status()
    as_json = {**keys.bearer("one"), "content-type": "application/json"}
    zipped = {**as_json, "content-encoding": "gzip"}
    arrays = {**as_json, "content-type": "application/x-npy"}
    names_both = {**as_json, "x-request-id": "same", "traceparent": "00-" + "1" * 32 + "-" + "1" * 16 + "-00"}

    def chunks(content: bytes) -> Iterator[bytes]:
        yield content[:7]
        yield content[7:]

    for number in (6.0, 5.0):
        forms = [
            (as_json, body(number)),
            (as_json, b" " + body(number, parameters={"priority": 2})),
            (zipped, gzip.compress(body(number))),
            (arrays, as_npy(number)),
            (names_both, body(number)),
        ]
        for headers, content in forms:
            reply = ask(server, headers, content)
            assert reply.json()["outputs"]["sum"] == right(number), (headers, content)
        chunked = server.post("/predict/cached", content=chunks(body(number)), headers=as_json)
        assert chunked.json()["outputs"]["sum"] == right(number)
        assert chunked.headers["cache-status"] == HIT
    # A body that only claims to be compressed is no key to what it would be without that claim.
    assert ask(server, zipped, body(5)).status_code == 400
    array = ask(server, {**as_json, "accept": "application/x-npy"}, body(5))
    assert array.headers["cache-status"] == HIT
    np.testing.assert_array_equal(np.load(BytesIO(array.content)), right(5))


def test_a_failure_is_not_kept(server: Server, keys: KeyFile) -> None:
    for _ in range(2):
        reply = ask(server, keys.bearer("one"), body(chaos.RAISE))
        assert reply.status_code == 500
        assert "cache-status" not in reply.headers


def test_an_unload_drops_the_entries(server: Server, keys: KeyFile) -> None:
    operator = keys.bearer("operator")
    for _ in range(2):
        ask(server, keys.bearer("one"), body(9)).raise_for_status()
    assert metric(server, keys, "cache_bytes") > 0
    server.post("/models/cached/unload", headers=operator).raise_for_status()
    wait_until(lambda: metric(server, keys, "cache_bytes") == 0, "the cache is empty")
    server.post("/models/cached/load", headers=operator).raise_for_status()
    wait_until(
        lambda: ask(server, keys.bearer("one"), body(9)).headers.get("cache-status") in (MISS, HIT),
        "it serves",
    )
    assert ask(server, keys.bearer("one"), body(9)).json()["outputs"]["sum"] == right(9)
