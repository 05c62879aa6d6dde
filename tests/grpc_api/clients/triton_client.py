"""Triton's own client, unmodified.

Its messages have the names of those of KServe's client, so each of the two has a process of its own.
"""

from __future__ import annotations

import asyncio
import queue
import sys
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

ROWS = np.random.default_rng(3).random((3, 1, 8, 8), dtype=np.float32)
TEXTS = np.array([["a", ""], ["é\0漢", "b"]], np.object_)


def image(rows: np.ndarray = ROWS) -> Any:
    given = triton.InferInput("image", list(rows.shape), "FP32")
    given.set_data_from_numpy(rows)
    return given


def main(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.is_model_ready("digits", "1")
        assert client.get_server_metadata().name == "inferpool"
        metadata = client.get_model_metadata("digits")
        assert [(tensor.name, list(tensor.shape)) for tensor in metadata.inputs] == [("image", [-1, 1, 8, 8])]
        index = client.get_model_repository_index(as_json=True)
        assert {"name": "digits", "version": "1", "state": "READY"} in index["models"]

        answer = client.infer("digits", [image()], request_id="mine", priority=1, timeout=5_000_000)
        logits = answer.as_numpy("logits")
        assert answer.get_response().id == "mine"
        assert logits.shape == (3, 10)
        wanted = triton.InferRequestedOutput("logits", class_count=2)
        best = client.infer("digits", [image()], outputs=[wanted]).as_numpy("logits")
        assert int(best[0, 0].decode().split(":")[1]) == logits[0].argmax()

        given = triton.InferInput("x0", [2, 2], "BYTES")
        given.set_data_from_numpy(TEXTS)
        back = client.infer("BYTES", [given]).as_numpy("y0")
        assert [text.decode() for text in back.reshape(-1)] == list(TEXTS.reshape(-1))

        config = client.get_model_config("digits", as_json=True)["config"]
        assert (config["name"], config["input"][0]["data_type"]) == ("digits", "TYPE_FP32")
        [counted] = client.get_inference_statistics("digits").model_stats
        assert (counted.name, counted.inference_count) == ("digits", 6)

        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client.async_infer("digits", [image()], lambda result, error: answers.put(result))
        assert np.array_equal(answers.get(timeout=60).as_numpy("logits"), logits)

        for model, expected in (("nobody", "StatusCode.NOT_FOUND"), ("BYTES", "StatusCode.INVALID_ARGUMENT")):
            with pytest.raises(InferenceServerException) as raised:
                client.infer(model, [image()])
            assert raised.value.status() == expected
    asyncio.run(from_asyncio(address, logits))


async def from_asyncio(address: str, logits: np.ndarray) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        answers = await asyncio.gather(
            *(client.infer("digits", [image(ROWS[n : n + 1])]) for n in range(len(ROWS)))
        )
        found = np.concatenate([answer.as_numpy("logits") for answer in answers])
        np.testing.assert_allclose(found, logits, rtol=1e-5)


main(sys.argv[1])
