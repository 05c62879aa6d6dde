"""KServe's own client, unmodified, with raw and with typed contents."""

from __future__ import annotations

import asyncio
import sys
import warnings

import numpy as np

with warnings.catch_warnings(action="ignore"):
    from kserve import InferInput, InferRequest
    from kserve.inference_client import InferenceGRPCClient

ROWS = np.random.default_rng(3).random((3, 1, 8, 8), dtype=np.float32)


async def main(address: str) -> None:
    client = InferenceGRPCClient(address)
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("digits")
    found = []
    for binary in (True, False):
        given = InferInput("image", list(ROWS.shape), "FP32")
        given.set_data_from_numpy(ROWS, binary_data=binary)
        answer = await client.infer(InferRequest("digits", [given], request_id="mine"))
        assert answer.id == "mine"
        found.append(answer.outputs[0].as_numpy())
    assert found[0].shape == (3, 10)
    assert np.array_equal(found[0], found[1])
    await client.close()


asyncio.run(main(sys.argv[1]))
