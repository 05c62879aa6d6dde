"""Requests without rows, or with rows without elements, are answered or refused; nothing else notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.backends.onnx.model_file import graph_operations
from inferpool.backends.onnx.run_errors import EmptyInput, find_rejection, fragile_operation, refuse_empty
from inferpool.http.predict.no_rows import EmptyAnswers, has_rows
from inferpool.tensors import Signature, Tensors, TensorSpec
from onnx import helper

from tests.backends.torch.networks import Centred, configure, described, save_scripted
from tests.onnx_models import constant, model, put, save, value
from tests.server import Server

node = helper.make_node


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def gru() -> Any:
    """Embeds ids and runs a GRU over them: the runtime aborts without a step, and without a row."""
    return model(
        [
            node("Gather", ["e", "ids"], ["x"]),
            node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
            node("GRU", ["t", "w", "r"], ["", "last"], hidden_size=4),
            node("Squeeze", ["last", "axis"], ["v"]),
            node("MatMul", ["v", "o"], ["logits"]),
        ],
        [value("ids", "INT64", ["batch", "steps"])],
        [value("logits", "FP32", ["batch", 2])],
        [
            constant("e", "FP32", normal(20, 8)),
            constant("w", "FP32", normal(1, 12, 8)),
            constant("r", "FP32", normal(1, 12, 4)),
            constant("axis", "INT64", np.array([0])),
            constant("o", "FP32", normal(4, 2)),
        ],
    )


@pytest.fixture(scope="module")
def server(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("no-rows")
    put(gru(), repository, "gru")
    (repository / "gru" / "model.toml").write_text("[labels]\n")
    (repository / "gru" / "labels.txt").write_text("no\nyes\n")
    put(
        model(
            [node("MatMul", ["x", "w"], ["y"])],
            [value("x", "FP32", ["n", 64])],
            [value("y", "FP32", ["n", 3])],
            [constant("w", "FP32", normal(64, 3))],
        ),
        repository,
        "matmul",
    )
    put(
        model(
            [node("Identity", ["x"], ["y"]), node("ReduceSum", ["x", "two"], ["s"], keepdims=0)],
            [value("x", "FP32", ["n", "m", 3])],
            [value("y", "FP32", ["n", "m", 3]), value("s", "FP32", ["n", "m"])],
            [constant("two", "INT64", np.array([2]))],
        ),
        repository,
        "same",
    )
    put(
        model(
            [node("Einsum", ["x", "x"], ["y"], equation="nij,nkj->nik")],
            [value("x", "FP32", ["n", "i", 2])],
            [value("y", "FP32", ["n", "i", "i"])],
        ),
        repository,
        "einsum",
    )
    put(
        model(
            [node("ReduceSum", ["x"], ["y"], keepdims=0)],
            [value("x", "FP32", ["n"])],
            [value("y", "FP32", [])],
        ),
        repository,
        "sum",
    )
    file = save_scripted(repository / "centred" / "1" / "model.pt", Centred().eval())
    configure(file, described(x=("FP32", [-1, 4])))
    server = Server(
        repository, ("--trust",), {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
    )
    server.wait_loaded()
    yield server
    server.kill()


def infer(server: Server, name: str, tensor: str, datatype: str, shape: list[int]) -> Any:
    """Send an empty tensor of this shape through /v2."""
    sent = {"name": tensor, "datatype": datatype, "shape": shape, "data": []}
    return server.post(f"/v2/models/{name}/infer", json={"inputs": [sent]})


@pytest.mark.parametrize(
    ("name", "tensor", "datatype", "shape", "outputs"),
    [
        ("gru", "ids", "INT64", [0, 5], {"logits": ("FP32", [0, 2])}),
        ("gru", "ids", "INT64", [0, 0], {"logits": ("FP32", [0, 2])}),
        ("matmul", "x", "FP32", [0, 64], {"y": ("FP32", [0, 3])}),
        ("same", "x", "FP32", [0, 7, 3], {"y": ("FP32", [0, 7, 3]), "s": ("FP32", [0, 7])}),
        ("einsum", "x", "FP32", [0, 5, 2], {"y": ("FP32", [0, 5, 5])}),
        ("centred", "x", "FP32", [0, 4], {"output_0": ("FP32", [0, 4])}),
    ],
)
def test_no_rows_get_no_rows(
    server: Server, name: str, tensor: str, datatype: str, shape: list[int], outputs: dict[str, Any]
) -> None:
    """With the right shapes and datatypes, batched or not; the model does not run."""
    ran = server.metric("batches_total", model=name)
    answer = infer(server, name, tensor, datatype, shape)
    assert answer.status_code == 200, answer.text
    found = {each["name"]: (each["datatype"], each["shape"]) for each in answer.json()["outputs"]}
    assert found == outputs
    native = server.post(f"/predict/{name}", json={"inputs": []})
    assert native.status_code == 200, native.text
    assert native.json()["outputs"] == {output: [] for output in outputs}
    assert native.json().get("predictions", []) == []
    only = [*outputs][-1]
    chosen = server.post(f"/predict/{name}", json={"inputs": [], "outputs": [only]})
    assert chosen.json()["outputs"] == {only: []}
    assert server.metric("batches_total", model=name) == ran


def test_a_row_without_steps_ends_no_server(server: Server) -> None:
    """The runtime would abort; the request is refused with the reason, and its neighbours are answered."""
    for answer in (
        server.post("/predict/gru", json={"inputs": [[]]}),
        server.post("/predict/gru", json={"inputs": [[], []]}),
        infer(server, "gru", "ids", "INT64", [1, 0]),
        infer(server, "einsum", "x", "FP32", [3, 0, 2]),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "model_rejected"), answer.text
        assert "takes no empty tensors" in answer.text
    assert server.post("/predict/gru", json={"inputs": [[1, 2]]}).status_code == 200


def test_rows_without_elements_run_where_the_model_takes_them(server: Server) -> None:
    answer = server.post("/predict/same", json={"inputs": [[], []]})
    assert answer.json()["outputs"] == {"y": [[], []], "s": [[], []]}
    found = infer(server, "same", "x", "FP32", [2, 0, 3]).json()["outputs"]
    assert [each["shape"] for each in found] == [[2, 0, 3], [2, 0]]


def test_an_output_without_rows_comes_from_the_model(server: Server) -> None:
    """The sum of nothing is 0, which only the model knows."""
    assert server.post("/predict/sum", json={"inputs": []}).json()["outputs"] == {"y": 0.0}


def test_open_dimensions_follow_the_inputs_as_far_as_they_are_named() -> None:
    signature = Signature(
        (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("x", "FP32", (-1, -1), symbols=("n", "width"))),
        (
            TensorSpec("tokens", "BF16", (-1, -1, 7)),
            TensorSpec("wide", "BYTES", (-1, -1), symbols=("n", "width")),
            TensorSpec("unknown", "BOOL", (-1, -1), symbols=("n", "other")),
            TensorSpec("any", "INT8", None),
            TensorSpec("scores", "JSON", None),
        ),
    )
    empty = EmptyAnswers(signature, {"tokens": (1,)}, "ids")
    inputs: Tensors = {"ids": np.zeros((0, 5), np.int64), "x": np.zeros((0, 9), np.float32)}
    found = empty.outputs(inputs, None)
    shapes = {name: tensor.shape for name, tensor in found.items() if name != "scores"}
    assert shapes == {"tokens": (0, 5, 7), "wide": (0, 9), "unknown": (0, 0), "any": (0,)}
    assert found["tokens"].dtype == np.uint16
    assert found["scores"] == []
    assert [*empty.outputs(inputs, ("any",))] == ["any"]
    assert has_rows(signature, True)
    assert not has_rows(signature, False)


def test_fragile_operations_are_found_wherever_they_are(tmp_path: Path) -> None:
    """In the graph, in a branch of it, and in a function."""
    body = helper.make_graph(
        [node("LSTM", ["x", "w", "r"], ["z"], hidden_size=1)], "inner", [], [value("z", "FP32", None)]
    )
    branch = model(
        [node("If", ["c"], ["y"], then_branch=body, else_branch=body)],
        [value("c", "BOOL", [])],
        [value("y", "FP32", None)],
    )
    assert graph_operations(save(branch, tmp_path, "branch.onnx")) == {"If", "LSTM"}
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], [node("Unique", ["a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    called = model(
        [helper.make_node("Twice", ["x"], ["y"], domain="own")],
        [value("x", "FP32", ["n"])],
        [value("y", "FP32", ["n"])],
        opsets={"own": 1},
        functions=[function],
    )
    assert graph_operations(save(called, tmp_path, "called.onnx")) == {"Twice", "Unique"}
    assert fragile_operation({"Add", "Unique"}) == "Unique"
    assert fragile_operation({"Add", "MatMul"}) == ""
    refuse_empty("GRU", {"x": np.zeros((1, 2))})
    with pytest.raises(EmptyInput) as raised:
        refuse_empty("GRU", {"x": np.zeros((1, 2)), "ids": np.zeros((1, 0))})
    rejection = find_rejection(raised.value)
    assert rejection is not None
    assert rejection.operation == "GRU"
