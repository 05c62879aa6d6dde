"""Small ONNX models that tests build, in a form that every supported ONNX Runtime reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
import onnxruntime
from inferpool.tensors import Array
from onnx import TensorProto, helper, numpy_helper

OPSETS: Final = {"": 21, "ai.onnx.ml": 3}
IR_VERSION: Final = 10

ELEMENTS: Final = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""Datatype of the protocol to element type in onnx.proto."""

Shape: TypeAlias = Sequence[int | str | None] | None


def value(name: str, datatype: str, shape: Shape) -> onnx.ValueInfoProto:
    """An input or output of a graph. The shape None leaves the rank open."""
    return helper.make_tensor_value_info(name, ELEMENTS[datatype], shape)


def value_of(name: str, kind: onnx.TypeProto) -> onnx.ValueInfoProto:
    """An input or output of a graph whose type is no plain tensor."""
    return helper.make_value_info(name, kind)


def tensor_type(datatype: str, shape: Shape = None) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(ELEMENTS[datatype], shape)


def constant(name: str, datatype: str, array: Array) -> onnx.TensorProto:
    """An initialiser. For BF16, `array` has the bits."""
    if datatype == "BYTES":
        # onnx.helper would cut NULs off their ends.
        texts = [text.encode() for text in array.flat]
        return TensorProto(name=name, data_type=TensorProto.STRING, dims=array.shape, string_data=texts)
    return helper.make_tensor(name, ELEMENTS[datatype], array.shape, array.tobytes(), raw=True)


def external(name: str, size: int, location: str) -> onnx.TensorProto:
    """An FP32 initialiser of `size` elements in another file."""
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[size], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    return tensor


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initialisers: Sequence[onnx.TensorProto] = (),
    **fields: Any,
) -> onnx.ModelProto:
    """A model of one graph. `fields` are set on the model; `opsets` are by domain."""
    opsets = {**OPSETS, **fields.pop("opsets", {})}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(initialisers))
    built: onnx.ModelProto = helper.make_model(
        graph, opset_imports=imports, **{"ir_version": IR_VERSION, **fields}
    )
    return built


def identity(datatype: str, shape: Shape, input_name: str = "x", output_name: str = "y") -> onnx.ModelProto:
    """A model that returns its input."""
    return model(
        [helper.make_node("Identity", [input_name], [output_name])],
        [value(input_name, datatype, shape)],
        [value(output_name, datatype, shape)],
    )


def add_external(location: str, size: int = 4) -> onnx.ModelProto:
    """A model that adds an initialiser from another file to its rows."""
    return model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [value("x", "FP32", ["n", size])],
        [value("y", "FP32", ["n", size])],
        [external("w", size, location)],
    )


def zip_map(**classes: Any) -> onnx.ModelProto:
    """A model whose output is a map from class to score for each row of two scores."""
    key = TensorProto.STRING if "classlabels_strings" in classes else TensorProto.INT64
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(key, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    return model(
        [helper.make_node("ZipMap", ["x"], ["scores"], domain="ai.onnx.ml", **classes)],
        [value("x", "FP32", ["n", 2])],
        [value_of("scores", kind)],
    )


def save(built: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Write a model into `folder`, which is created if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_bytes(built.SerializeToString())
    return file


def put(built: onnx.ModelProto, repository: Path, name: str) -> Path:
    """Write a model into a repository as version 1 of `name`."""
    return save(built, repository / name / "1")


def write_model(repository: Path, name: str, graph: onnx.GraphProto) -> Path:
    """Write version 1 of a model into `repository`; returns its file."""
    file = repository / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())
    return file


def write_identity(
    repository: Path, name: str, datatypes: Sequence[str], shape: Shape = ("rows", "columns")
) -> Path:
    """A model that returns `x0`, `x1`, … as `y0`, `y1`, …, one tensor for each of `datatypes`."""
    return write_model(
        repository,
        name,
        helper.make_graph(
            [helper.make_node("Identity", [f"x{n}"], [f"y{n}"]) for n in range(len(datatypes))],
            name,
            [
                helper.make_tensor_value_info(f"x{n}", ELEMENTS[datatype], shape)
                for n, datatype in enumerate(datatypes)
            ],
            [
                helper.make_tensor_value_info(f"y{n}", ELEMENTS[datatype], shape)
                for n, datatype in enumerate(datatypes)
            ],
        ),
    )


def bf16(*numbers: float) -> Array:
    """The BF16 bits of numbers that BF16 represents exactly: the upper half of their FP32 bits."""
    wide = np.array(numbers, dtype=np.float32).view(np.uint32)
    assert not (wide & 0xFFFF).any(), "not a BF16 number"
    return (wide >> 16).astype(np.uint16)


def write_session(
    repository: Path,
    name: str,
    nodes: list[onnx.NodeProto],
    taken: onnx.ValueInfoProto,
    given: onnx.ValueInfoProto,
    constants: dict[str, Any],
) -> onnxruntime.InferenceSession:
    """Write a model of one input and one output; return a session of it, whose answers are right."""
    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, [taken], [given], tensors)
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    file = put(built, repository, name)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def write_shift(repository: Path, name: str, version: int, by: float | Sequence[float]) -> Path:
    """Write a version that adds `by` to each of the two elements of a row; renamed into place as a whole.

    `by` is one number for both elements, or one for each.
    """
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "by"], ["y"])],
        name,
        [value("x", "FP32", ["rows", 2])],
        [value("y", "FP32", ["rows", 2])],
        [constant("by", "FP32", np.atleast_1d(np.array(by, np.float32)))],
    )
    folder = repository / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "model.tmp"
    onnx.save(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 17)]),
        unfinished,
    )
    unfinished.replace(folder / "model.onnx")
    return folder
