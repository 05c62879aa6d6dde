"""Each form of a model answers nearly as the model does, and is the same file every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from inferpool.backends.base import LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.errors import LoadError
from inferpool.release.optimise.candidates import (
    CANDIDATES,
    names_of,
    prune,
    store_in_bf16,
    to_bf16,
    to_fp16,
    to_int8_dynamic,
)
from inferpool.release.optimise.unfit import Unfit
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

CHANGED = {
    "graph": "FusedGemm",
    "fp16": "Cast",
    "bf16": "Cast",
    "bf16-weights": "Cast",
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


def session(file: Path) -> ort.InferenceSession:
    return ort.InferenceSession(file, providers=["CPUExecutionProvider"])


def reference(file: Path) -> Any:
    return ReferenceEvaluator(str(file))


@pytest.mark.parametrize("candidate", CANDIDATES, ids=[each.name for each in CANDIDATES])
def test_a_form_answers_nearly_the_same_and_is_the_same_file_again(candidate: object, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    write_network(model)
    files = [tmp_path / f"{number}.onnx" for number in range(2)]
    for file in files:
        candidate.make(model, file, [{"x": rows(32)}])  # type: ignore[attr-defined]
    assert files[0].read_bytes() == files[1].read_bytes()
    # No processor runs BF16 in ONNX Runtime, so ONNX itself does.
    make: Any = reference if candidate.name == "bf16" else session  # type: ignore[attr-defined]
    before = session(model).run(None, {"x": rows(16)})[0]
    after = make(files[0]).run(None, {"x": rows(16)})[0]
    scale = np.abs(before).max()
    worst = {"unstructured-50": 0.6, "int4": 0.2}.get(candidate.name, 0.1)  # type: ignore[attr-defined]
    assert np.abs(after - before).max() < worst * scale
    operations = {node.op_type for node in onnx.load(files[0]).graph.node}
    if candidate.name != "graph":  # type: ignore[attr-defined]  # what is fused is the runtime's choice
        assert CHANGED[candidate.name] in operations  # type: ignore[attr-defined]


def elements(file: Path) -> dict[str, int]:
    """The datatype of each constant of a model."""
    return {tensor.name: tensor.data_type for tensor in onnx.load(file).graph.initializer}


def test_operations_in_bf16_are_refused_by_the_runtime_with_its_own_reason(tmp_path: Path) -> None:
    """If this fails, ONNX Runtime has learnt BF16 on processors: the documents say that it has not."""
    model, form = tmp_path / "model.onnx", tmp_path / "form.onnx"
    write_network(model)
    to_bf16(model, form, [])
    onnx.checker.check_model(onnx.load(form), full_check=True)
    assert set(elements(form).values()) == {TensorProto.BFLOAT16}
    with pytest.raises(LoadError, match="Could not find an implementation for Relu"):
        OnnxBackend().load(form, LoadOptions())


def test_weights_are_rounded_to_bf16_from_numbers_that_fp16_cannot_hold(tmp_path: Path) -> None:
    """Also those of constants and of subgraphs. Operations that ONNX has without BF16 stay in FP32."""
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.array([1e6], np.float32))),
         helper.make_node("Mul", ["k", "a"], ["m"])],
        "inner", [], [helper.make_tensor_value_info("m", TensorProto.FLOAT, ["rows", 2])],
    )  # fmt: skip
    nodes = [
        helper.make_node(
            "Constant", [], ["c"], value=numpy_helper.from_array(np.array([[1e-9]], np.float32))
        ),
        helper.make_node("Mul", ["x", "c"], ["s"]),
        helper.make_node("Mul", ["s", "w"], ["a"]),
        helper.make_node("If", ["yes"], ["i"], then_branch=inner, else_branch=inner),
        helper.make_node("ThresholdedRelu", ["i"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [
            numpy_helper.from_array(np.array([[1e9, 3e9]], np.float32), "w"),
            numpy_helper.from_array(np.array(True), "yes"),
        ],
    )
    model, form = tmp_path / "model.onnx", tmp_path / "form.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), model)
    to_bf16(model, form, [])
    assert elements(form)["w"] == TensorProto.BFLOAT16
    answer = reference(form).run(None, {"x": np.array([[1, 2]], np.float32)})[0]
    assert answer == pytest.approx(np.array([[1e6, 6e6]], np.float32), rel=0.02)
    assert answer.dtype == np.float32


def test_named_nodes_and_operations_stay_in_fp32(tmp_path: Path) -> None:
    model, form = tmp_path / "model.onnx", tmp_path / "form.onnx"
    write_network(model)
    network = onnx.load(model)
    network.graph.node[3].name = "last"
    onnx.save(network, model)
    assert names_of(model) == {"MatMul", "Add", "Relu", "last"}
    for make, element in ((to_fp16, TensorProto.FLOAT16), (to_bf16, TensorProto.BFLOAT16)):
        make(model, form, [], kept=["last", "Add"])
        assert elements(form) == {"w1": element, "b1": TensorProto.FLOAT, "w2": TensorProto.FLOAT}
    store_in_bf16(model, form, [], kept=["last"])
    assert set(elements(form).items()) == {
        ("w1_in_bf16", TensorProto.BFLOAT16), ("b1", TensorProto.FLOAT), ("w2", TensorProto.FLOAT),
    }  # fmt: skip


def test_what_bf16_cannot_be_made_of_says_so(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 4]) for name in "xy"]
    half = numpy_helper.from_array(np.array([[1]], np.float16), "w")
    cast = [
        helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "v"], ["y"]),
    ]
    for nodes, constants, opset, reason in (
        ([helper.make_node("Relu", ["x"], ["y"])], [], 12, "BF16 needs opset 13, and the model has 12"),
        ([helper.make_node("Celu", ["x"], ["y"])], [], 21, "none of the operations in BF16, in opset 21"),
        (cast, [half], 21, "tensors in FP16 already"),
    ):
        graph = helper.make_graph(nodes, "network", value[:1], value[1:], constants)
        model = tmp_path / "model.onnx"
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.save(made, model)
        with pytest.raises(Unfit, match=reason):
            to_bf16(model, tmp_path / "form.onnx", [])


def test_a_model_without_weights_has_no_such_forms(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
    )
    model = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), model)
    for make in (to_int8_dynamic, prune, store_in_bf16):
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
