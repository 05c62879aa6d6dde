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

        stream(client, logits)
        for model, expected in (("nobody", "StatusCode.NOT_FOUND"), ("BYTES", "StatusCode.INVALID_ARGUMENT")):
            with pytest.raises(InferenceServerException) as raised:
                client.infer(model, [image()])
            assert raised.value.status() == expected
    asyncio.run(from_asyncio(address, logits))


def stream(client: Any, logits: np.ndarray) -> None:
    """A stream has its responses in order, and survives requests that fail."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(100):
        model = "digits" if number % 10 else "nobody"
        row = ROWS[number % 3 : number % 3 + 1]
        client.async_stream_infer(
            model, [image(row)], request_id=str(number), enable_empty_final_response=number % 2 == 1
        )
    for number in range(100):
        result, error = answers.get(timeout=60)
        assert (error is None) == bool(number % 10), error
        if error is None:
            assert result.get_response().id == str(number)
            assert result.get_response().parameters["triton_final_response"].bool_param
            np.testing.assert_allclose(result.as_numpy("logits")[0], logits[number % 3], rtol=1e-4, atol=1e-5)
        else:
            assert "nobody" in error.message()
    client.stop_stream()
    # Another one, which the client breaks off.
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("digits", [image()])
    assert answers.get(timeout=60)[1] is None
    client.stop_stream(cancel_requests=True)


async def from_asyncio(address: str, logits: np.ndarray) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        answers = await asyncio.gather(
            *(client.infer("digits", [image(ROWS[n : n + 1])]) for n in range(len(ROWS)))
        )

        async def requests() -> Any:
            for number in range(3):
                yield {"model_name": "digits", "inputs": [image()], "request_id": str(number)}

        ids = [result.get_response().id async for result, _ in client.stream_infer(requests())]
        assert ids == ["0", "1", "2"]
        found = np.concatenate([answer.as_numpy("logits") for answer in answers])
        np.testing.assert_allclose(found, logits, rtol=1e-5)


main(sys.argv[1])
