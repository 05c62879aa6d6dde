"""Each form of a model answers nearly as the model does, and is the same file every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from inferpool.release.optimise.candidates import CANDIDATES, Unfit, prune, to_int8_dynamic
from onnx import TensorProto, helper, numpy_helper

CHANGED = {
    "graph": "FusedGemm",
    "fp16": "Cast",
    "int8-dynamic": "MatMulInteger",
    "int8-static": "QuantizeLinear",
    "int4": "MatMulNBits",
    "unstructured-50": "MatMul",
}
"""An operation that each form of the network of these tests has."""


def write_network(file: Path, *, seed: int = 0) -> None:
    """A network of two products with 64 inputs and 3 outputs."""
    source = np.random.default_rng(seed)
    weights = [source.normal(0, 0.1, size).astype(np.float32) for size in ((64, 128), (128,), (128, 3))]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Add", ["a", "b1"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
        [
            numpy_helper.from_array(values, name)
            for name, values in zip(("w1", "b1", "w2"), weights, strict=True)
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(count, 64)).astype(np.float32)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=[each.name for each in CANDIDATES])
def test_a_form_answers_nearly_the_same_and_is_the_same_file_again(candidate: object, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    write_network(model)
    files = [tmp_path / f"{number}.onnx" for number in range(2)]
    for file in files:
        candidate.make(model, file, [{"x": rows(32)}])  # type: ignore[attr-defined]
    assert files[0].read_bytes() == files[1].read_bytes()
    before, after = (
        ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": rows(16)})[0]
        for file in (model, files[0])
    )
    scale = np.abs(before).max()
    worst = {"unstructured-50": 0.6, "int4": 0.2}.get(candidate.name, 0.1)  # type: ignore[attr-defined]
    assert np.abs(after - before).max() < worst * scale
    operations = {node.op_type for node in onnx.load(files[0]).graph.node}
    if candidate.name != "graph":  # type: ignore[attr-defined]  # what is fused is the runtime's choice
        assert CHANGED[candidate.name] in operations  # type: ignore[attr-defined]


def test_there_is_no_form_in_bf16_because_processors_would_not_run_it() -> None:
    """If this fails, ONNX Runtime has learnt it: add the form."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [4, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(Exception, match="Could not find an implementation for MatMul"):
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_model_without_weights_has_no_such_forms(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
    )
    model = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), model)
    for make in (to_int8_dynamic, prune):
        with pytest.raises(Unfit):
            make(model, tmp_path / "form.onnx", [])


def test_products_beside_attention_without_names_are_quantised(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(0, 0.1, (64, 64)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Attention", ["a", "a", "a"], ["y"], q_num_heads=4, kv_num_heads=4),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 5, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 5, 64])],
        [numpy_helper.from_array(weights, "w")],
    )
    model, form = tmp_path / "model.onnx", tmp_path / "form.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), model)
    to_int8_dynamic(model, form, [])
    found = {node.op_type for node in onnx.load(form).graph.node}
    assert {"MatMulInteger", "Attention"} <= found
