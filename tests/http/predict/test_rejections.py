"""An input that the runtime refuses is the client's fault, and costs only the guilty request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import pytest
import torch
from inferpool.backends.base import Rejection
from inferpool.backends.onnx.run_errors import find_rejection as find_in_onnx
from inferpool.backends.torch.run_errors import find_rejection as find_in_torch
from inferpool.pool.redaction import refusal_text
from onnx import helper
from torch import nn

from tests.backends.torch.networks import configure, described, save_exported, save_scripted
from tests.clients import Client, with_clients
from tests.onnx_models import constant, model, put, value
from tests.server import Server

node = helper.make_node
SECRET: Final = 98_765
IDS: Final = described(ids=("INT64", [-1, -1]))
PICTURES: Final = described(x=("FP32", [-1, 3, -1, -1]))
EMBEDDING: Final = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.table.weight = nn.Parameter(torch.tensor(EMBEDDING))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).sum(1)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).mean((2, 3))


class Strict(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 5):
            raise ValueError("the rows are too large")
        return x


@pytest.fixture(scope="module")
def server(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("rejections")
    gather = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("ReduceSum", ["rows", "one"], ["y"], keepdims=0),
    ]
    constants = [constant("table", "FP32", EMBEDDING), constant("one", "INT64", np.array([1]))]
    put(
        model(gather, [value("ids", "INT64", ["n", "steps"])], [value("y", "FP32", ["n", 4])], constants),
        repository,
        "ids-onnx",
    )
    convolution = [
        node("Conv", ["x", "w"], ["f"]),
        node("GlobalAveragePool", ["f"], ["p"]),
        node("Flatten", ["p"], ["y"]),
    ]
    put(
        model(
            convolution,
            [value("x", "FP32", ["n", 3, "h", "w"])],
            [value("y", "FP32", ["n", 2])],
            [constant("w", "FP32", np.ones((2, 3, 3, 3), np.float32))],
        ),
        repository,
        "pictures-onnx",
    )
    put(
        model(
            [node("Cast", ["text"], ["y"], to=1)],
            [value("text", "BYTES", ["n"])],
            [value("y", "FP32", ["n"])],
        ),
        repository,
        "numbers-onnx",
    )
    put(
        model(
            [node("Expand", ["x", "shape"], ["y"])],
            [value("x", "FP32", ["n", 1]), value("shape", "INT64", ["k"])],
            [value("y", "FP32", None)],
        ),
        repository,
        "huge-onnx",
    )
    for name, module, config in (
        ("ids-script", Embedding(), IDS),
        ("pictures-script", Convolution(), PICTURES),
        ("strict-script", Strict(), described(x=("FP32", [-1, 2]))),
    ):
        configure(save_scripted(repository / name / "1" / "model.pt", module.eval()), config)
    steps = torch.export.Dim("steps", min=2)
    rows = torch.export.Dim("rows")
    save_exported(
        repository / "ids-exported" / "1" / "model.pt2",
        Embedding().eval(),
        torch.zeros(3, 5, dtype=torch.int64),
        shapes=({0: rows, 1: steps},),
    )
    server = Server(
        repository, ("--trust",), {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
    )
    server.wait_loaded()
    yield server
    server.kill()


@pytest.mark.parametrize(
    ("name", "inputs", "hints"),
    [
        ("ids-onnx", [[1, SECRET]], ["Gather", "out of data bounds"]),
        ("ids-script", [[1, SECRET]], ["embedding", "index out of range"]),
        ("ids-exported", [[1, SECRET]], ["index out of range"]),
        ("pictures-onnx", np.zeros((1, 3, 2, 2)).tolist(), ["Conv", "2,2"]),
        ("pictures-script", np.zeros((1, 3, 2, 2)).tolist(), ["conv2d", "greater than actual input size"]),
        ("numbers-onnx", ["secret words"], ["Cast"]),
        ("strict-script", [[4.0, 4.0]], ["the rows are too large"]),
    ],
)
def test_a_refused_input_is_the_clients_fault(
    server: Server, name: str, inputs: Any, hints: list[str]
) -> None:
    """422 with the runtime's reason, without the input and without paths, natively and in /v2."""
    answer = server.post(f"/predict/{name}", json={"inputs": inputs})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "model_rejected"), answer.text
    assert "the model refuses this input" in problem["detail"]
    for hint in hints:
        assert hint in problem["detail"]
    for hidden in (str(SECRET), "secret", "/", ".cc", ".py", "ONNXRuntimeError"):
        assert hidden not in problem["detail"], problem["detail"]

    array = np.array(inputs)
    datatype = {"i": "INT64", "f": "FP32", "U": "BYTES"}[array.dtype.kind]
    (tensor_name,) = (each["name"] for each in server.get(f"/models/{name}/1").json()["inputs"])
    tensor = {"name": tensor_name, "datatype": datatype, "shape": array.shape, "data": array.ravel().tolist()}
    other = server.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})
    assert (other.status_code, other.json()["code"]) == (422, "model_rejected"), other.text


def test_a_machine_without_memory_is_no_fault_of_the_client(server: Server) -> None:
    inputs = {"x": [[1.0]], "shape": [2**20, 2**24]}
    answer = server.post("/predict/huge-onnx", json={"inputs": inputs})
    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded"), answer.text


@pytest.mark.parametrize("name", ["ids-onnx", "ids-script"])
def test_only_the_guilty_request_of_a_batch_is_refused(server: Server, name: str) -> None:
    """Every third of 8 clients sends an index out of range; the others get the answer they get alone."""
    assert server.get(f"/models/{name}/1").json()["batching"]["enabled"]

    async def work(client: Client, number: int) -> None:
        rng = np.random.default_rng(number)
        for turn in range(20):
            ids = rng.integers(0, 20, (1, 6))
            guilty = (number + turn) % 3 == 0
            sent = ids.copy()
            if guilty:
                sent[0, 3] = SECRET
            reply = await client.post(f"/predict/{name}", json.dumps({"inputs": sent.tolist()}).encode())
            found = json.loads(reply.body)
            if guilty:
                assert (reply.status, found["code"]) == (422, "model_rejected")
            else:
                (output,) = found["outputs"].values()
                np.testing.assert_allclose(output, EMBEDDING[ids].sum(1), rtol=1e-5, atol=1e-5)

    asyncio.run(with_clients(server.port, 8, work))


def test_errors_that_are_no_refusals() -> None:
    """Without a type and a text of the runtime, nothing says that the input is at fault."""
    assert find_in_onnx(ValueError("Non-zero status code returned while running A node.")) is None
    assert find_in_torch(TypeError("index out of range")) is None
    assert find_in_torch(NotImplementedError("no kernel")) is None
    for text in ("CUDA error: an illegal access", "DefaultCPUAllocator: can't allocate memory",
                 "x INTERNAL ASSERT FAILED at y", "could not create a primitive"):  # fmt: skip
        assert find_in_torch(RuntimeError(text)) is None, text
    fail = onnxruntime.capi.onnxruntime_pybind11_state.Fail
    start = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running A node. Name:'b'"
    for text in ("Failed to allocate memory for requested buffer of size 8", "CUDA failure 700",
                 "Exiting due to terminate flag being set to true."):  # fmt: skip
        assert find_in_onnx(fail(f"{start} Status Message: {text}")) is None, text
    assert find_in_onnx(fail(f"{start} Status Message: no")) == Rejection("A", "no")


def test_a_reason_has_no_paths_and_no_values() -> None:
    inputs = {"x": np.array([17.0], np.float32)}
    for reason, text in (
        ("17 is more than 3 in /opt/model/code.py:12", "… is more than 3 in …"),
        (r"see C:\models\a.onnx", "see …"),
        ("two\nlines", "two lines"),
    ):
        assert refusal_text(Rejection("", reason), inputs) == f"the model refuses this input: {text}"
    texts = {"t": np.array(["hush"], object)}
    assert refusal_text(Rejection("A", "not hush"), texts) == "the model refuses this input: A"
    assert refusal_text(Rejection("", "not hush"), texts) == "the model refuses this input"
