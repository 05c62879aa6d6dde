"""Small ONNX models that tests make for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

ELEMENTS = {
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
"""Every datatype to ONNX's own."""
Shape = Sequence[int | str | None]


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
    """A model that gives `x0`, `x1`, … back as `y0`, `y1`, …, one of each of `datatypes`."""
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
