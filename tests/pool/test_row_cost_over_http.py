"""Pictures of several sizes through the real server: each is admitted, batched and delayed by its cost."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from typing import NamedTuple

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.clients import Client, with_clients
from tests.conftest import Serve
from tests.onnx_models import write_model
from tests.server import Server

LARGE, SMALL = 768, 32
MAX_ROWS = 16


class Answered(NamedTuple):
    """An answer: how long it took, and how long its picture waited and ran; 0 if it did not."""

    status: int
    seconds: float
    queue_ms: float
    compute_ms: float
    body: bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, module_serve: Serve) -> Server:
    """A server with one instance of a network that denoises pictures of any size."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(7)
    weights = {"a": (32, 3, 3, 3), "b": (3, 32, 3, 3)}
    picture: list[str | int | None] = ["batch", 3, "height", "width"]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "a"], ["f"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["f"], ["g"]),
            helper.make_node("Conv", ["g", "b"], ["y"], pads=[1, 1, 1, 1]),
        ],
        "denoise",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, picture)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, picture)],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    write_model(folder, "denoise", graph)
    (folder / "denoise" / "model.toml").write_text(
        f"[batching]\nmax_rows = {MAX_ROWS}\n[instances]\ncount = 1\nthreads = 1\n"
    )
    return module_serve(folder, INFERPOOL_MEASURE_MS="2000")


def npy(side: int) -> bytes:
    """A picture as npy."""
    file = io.BytesIO()
    np.save(file, np.full((1, 3, side, side), 0.5, np.float32))
    return file.getvalue()


async def send(client: Client, body: bytes, timeout_ms: float | None = None) -> Answered:
    began = time.monotonic()
    headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    if timeout_ms is not None:
        headers["x-timeout-ms"] = str(timeout_ms)
    reply = await client.post("/predict/denoise", body, headers)
    seconds = time.monotonic() - began
    spent = dict(re.findall(r"(\w+);dur=([\d.]+)", reply.headers.get("server-timing", "")))
    queue_ms, compute_ms = (float(spent.get(name, 0)) for name in ("queue", "compute"))
    return Answered(reply.status, seconds, queue_ms, compute_ms, reply.body)


def test_a_large_picture_is_judged_by_its_own_cost(server: Server) -> None:
    version = server.get("/models/denoise/1").json()
    costs = version["row_cost"]
    assert [cost["elements"] for cost in costs] == sorted({cost["elements"] for cost in costs})
    assert costs[0]["elements"] == 3 * 16 * 16
    assert costs[-1]["elements"] >= 3 * 128 * 128
    # It has 64 times the work of the smallest one; on a busy machine it seems less, or more.
    assert costs[-1]["rows"] > version["batching"]["max_rows"] == MAX_ROWS

    alone: list[float] = []
    refused: list[Answered] = []
    answered: list[Answered] = []
    body = npy(LARGE)

    async def one(client: Client, number: int) -> None:
        alone.append((await send(client, body)).seconds)

    async def hurried(client: Client, number: int) -> None:
        reply = await send(client, body, 3000 * min(alone))
        (refused if reply.status == 504 else answered).append(reply)

    asyncio.run(with_clients(server.port, 1, one))
    asyncio.run(with_clients(server.port, 1, one))
    for _ in range(5):  # on a machine that is busy with other things, runs take longer than was expected
        refused.clear()
        asyncio.run(with_clients(server.port, 12, hurried))
        assert refused, "twelve pictures do not run in the time of three"
        at_once = [reply for reply in refused if "would be missed" in json.loads(reply.body)["detail"]]
        if len(at_once) > len(refused) / 2:
            break
    assert len(at_once) > len(refused) / 2
    assert all(reply.status == 200 for reply in answered)
    # Each large picture ran alone: a batch of several would cost more than a batch may.
    rows, batches = server.metric("batch_rows_sum"), server.metric("batch_rows_count")
    # A run that begins in time and ends late is counted, though its request has its answer by then.
    assert rows == batches >= 2 + len(answered)


def test_small_pictures_wait_for_no_large_one_but_the_one_that_runs(server: Server) -> None:
    large: list[Answered] = []
    small: list[Answered] = []
    body = npy(LARGE)

    async def scenario() -> None:
        async def many(client: Client, number: int) -> None:
            while not small:
                large.append(await send(client, body))

        work = asyncio.create_task(with_clients(server.port, 8, many))
        await asyncio.to_thread(server.wait_for_metric, "queue_rows", at_least=6, model="denoise")

        async def few(client: Client, number: int) -> None:
            small.append(await send(client, npy(SMALL)))

        await with_clients(server.port, 1, few)
        await work

    asyncio.run(scenario())
    assert {reply.status for reply in (*large, *small)} == {200}
    # In its turn it would wait for seven large ones.
    assert small[0].queue_ms < 3 * np.median([reply.compute_ms for reply in large])
