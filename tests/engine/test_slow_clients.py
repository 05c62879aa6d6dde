"""An answer that a client reads slowly stays as it was, though its engine's memory is used again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from inferpool.tensors import Array

from tests.clients import Client
from tests.conftest import Serve
from tests.kills.workload import Request, binary_request
from tests.onnx_models import identity, put

SHAPE = (4, 500_000)
"""8 MB, more than the socket takes of an answer that nobody reads."""


def ask(rows: Array) -> Request:
    return binary_request("m", {"x": rows}, {"y": rows})


def test_a_large_answer_that_is_read_late_has_its_own_rows(serve: Serve, tmp_path: Path) -> None:
    put(identity("FP32", ["rows", "columns"]), tmp_path, "m")
    server = serve(tmp_path, "--engine", "process", "--web-processes", "1", "--measure-ms", "0")

    async def scenario() -> None:
        slow, quick = await Client.connect(server.port), await Client.connect(server.port)
        late = ask(np.full(SHAPE, 1, np.float32))
        slow.send(late.path, late.body, late.headers)
        await asyncio.to_thread(server.wait_for_metric, "requests_total", at_least=1, model="m", code="200")
        for number in range(2, 5):
            other = ask(np.full(SHAPE, number, np.float32))
            assert other.fault(await quick.post(other.path, other.body, other.headers)) is None
        assert late.fault(await slow.receive()) is None
        await slow.close()
        await quick.close()

    asyncio.run(scenario())
