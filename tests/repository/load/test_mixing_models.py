"""Models whose operations mix rows answer each request as they answer it alone, whatever runs beside it."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto as Type
from onnx import helper

from tests.clients import Client, with_clients
from tests.conftest import Serve
from tests.onnx_models import write_session

node = helper.make_node
CLIENTS, ROUNDS = 8, 20


@pytest.fixture
def sessions(tmp_path: Path) -> dict[str, onnxruntime.InferenceSession]:
    """Sessions of the models in the folder `mixing`."""
    info, rng = helper.make_tensor_value_info, np.random.default_rng(7)
    folder = tmp_path / "mixing"
    return {
        "stretch": write_session(
            folder, "stretch",
            [node("Cast", ["x"], ["f"], to=Type.FLOAT), node("ReduceMax", ["f"], ["top"], keepdims=0),
             node("Div", ["f", "top"], ["n"]), node("Flatten", ["n"], ["v"]),
             node("MatMul", ["v", "w"], ["y"])],
            info("x", Type.UINT8, ["batch", 8, 8]), info("y", Type.FLOAT, ["batch", 3]),
            {"w": rng.standard_normal((64, 3)).astype(np.float32)},
        ),
        "rescale": write_session(
            folder, "rescale",
            [node("ReduceMax", ["x"], ["top"], keepdims=0), node("Greater", ["top", "limit"], ["bright"]),
             node("Where", ["bright", "big", "one"], ["d"]), node("Div", ["x", "d"], ["y"])],
            info("x", Type.FLOAT, ["batch", 4]), info("y", Type.FLOAT, ["batch", 4]),
            {"limit": np.float32(50), "big": np.float32(255), "one": np.float32(1)},
        ),
        "words": write_session(
            folder, "words", [node("StringSplit", ["x"], ["y", "count"], delimiter=" ")],
            info("x", Type.STRING, ["batch"]), info("y", Type.STRING, ["batch", "most"]), {},
        ),
        "keep": write_session(
            folder, "keep",
            [node("Slice", ["x", "zero", "one", "axis"], ["first"]),
             node("Squeeze", ["first", "axis"], ["flat"]), node("Greater", ["flat", "least"], ["good"]),
             node("Compress", ["x", "good"], ["y"], axis=0)],
            info("x", Type.FLOAT, ["batch", 2]), info("y", Type.FLOAT, ["left", 2]),
            {"zero": np.array([0]), "one": np.array([1]), "axis": np.array([1]), "least": np.float32(-50)},
        ),
    }  # fmt: skip


SENT: dict[str, list[Any]] = {
    "stretch": [
        (np.random.default_rng(1).integers(0, 61, (8, 8))).tolist(),
        (np.random.default_rng(2).integers(0, 256, (8, 8))).tolist(),
    ],
    "rescale": [[0.1, 0.2, 0.3, 0.4], [255.0, 200.0, 100.0, 50.0]],
    "words": ["hi", "a b c d"],
    "keep": [[-60.0, 1.0], [1.0, 2.0]],
}
"""Two rows, by model."""
TYPES = {"stretch": np.uint8, "rescale": np.float32, "words": object, "keep": np.float32}


def test_each_client_gets_the_answer_of_its_request_alone(
    tmp_path: Path, sessions: dict[str, onnxruntime.InferenceSession], serve: Serve
) -> None:
    server = serve(tmp_path / "mixing")
    for name, session in sessions.items():
        batching = server.get(f"/models/{name}").json()["versions"][0]["batching"]
        assert not batching["enabled"], name
        assert "rows depend on one another" in batching["reason"]
        rows = SENT[name]
        right = [session.run(["y"], {"x": np.array([row], TYPES[name])})[0].tolist() for row in rows]

        asyncio.run(with_clients(server.port, CLIENTS, partial(ask, name, rows, right)))


async def ask(name: str, rows: list[Any], right: list[Any], client: Client, number: int) -> None:
    """Send both rows in turn, and compare the answers with those that are right."""
    for turn in range(ROUNDS):
        which = (number + turn) % 2
        reply = await client.post(f"/predict/{name}", json.dumps({"inputs": [rows[which]]}).encode())
        assert reply.status == 200, reply.body
        answer = json.loads(reply.body)["outputs"]["y"]
        if TYPES[name] is object:
            assert answer == right[which]
        else:
            assert np.shape(answer) == np.shape(right[which]), (name, which)
            assert np.allclose(answer, right[which], rtol=1e-5), (name, which)
