"""Makes the forms of an ONNX model in BF16: of weights and operations, or of weights alone.

The converter to FP16 finds which values change, and where casts stand between them and the operations that
stay in FP32. The form in BF16 is the same graph with another datatype. Its weights are rounded from the
original's: FP16 has another range.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

import ml_dtypes
import onnx
from onnx import TensorProto, helper, numpy_helper

from inferpool.release.optimise.unfit import Unfit

LEAST_OPSET: Final = 13
"""The first opset with BF16."""
_STORED: Final = "_in_bf16"
_TYPES: Final = ("to", "dtype")
"""The attributes of nodes that name a datatype."""


def block_operations(model: Any) -> set[str]:
    """Return the operations of a model that ONNX has without BF16, in the model's opset; raises Unfit.

    Names the nodes of subgraphs, so that `to_brain_floats` finds their constants again.
    """
    opset = _opset(model)
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    for number, node in enumerate(nodes[len(model.graph.node) :], len(model.graph.node)):
        node.name = f"{number}:{node.name}"
    if any(tensor.data_type == TensorProto.FLOAT16 for _, tensor in _tensors(model.graph)):
        raise Unfit("the model has tensors in FP16 already")
    blocked = {node.op_type for node in nodes if not _takes_bf16(node, opset)}
    if all(node.op_type in blocked for node in nodes):
        raise Unfit(f"ONNX has none of the operations in BF16, in opset {opset}")
    return blocked


def floats_of(model: Any) -> dict[object, Any]:
    """Return copies of the constants of a model in FP32, by where they are."""
    return {
        where: numpy_helper.to_array(tensor).copy()
        for where, tensor in _tensors(model.graph)
        if tensor.data_type == TensorProto.FLOAT
    }


def to_brain_floats(half: Any, originals: dict[object, Any]) -> Any:
    """Make BF16 of all that is FP16 in a converted model, which is changed; returns it.

    `originals` are the constants from before the conversion.
    """
    for graph in _graphs(half.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for kind in (value.type.tensor_type, value.type.sequence_type.elem_type.tensor_type):
                if kind.elem_type == TensorProto.FLOAT16:
                    kind.elem_type = TensorProto.BFLOAT16
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in _TYPES and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.BFLOAT16
    for where, tensor in _tensors(half.graph):
        if tensor.data_type == TensorProto.FLOAT16:
            _round(tensor, originals[where] if where in originals else numpy_helper.to_array(tensor))
    return half


def store_brain_floats(model: Any, kept: Collection[str]) -> Any:
    """Round the weights of a model, which is changed, and cast them to FP32 before they are used.

    Tensors of one dimension stay as they are, and those that a node uses whose name or operation is in
    `kept`. Raises Unfit.
    """
    _opset(model)
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    fixed.update(name for node in graph.node if {node.name, node.op_type} & set(kept) for name in node.input)
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and tensor.name not in fixed:
            name = tensor.name
            _round(tensor, numpy_helper.to_array(tensor))
            tensor.name = name + _STORED
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    if not casts:
        raise Unfit("there are no weights in FP32")
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _round(tensor: Any, values: Any) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), tensor.name))


def _opset(model: Any) -> int:
    found = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if found < LEAST_OPSET:
        raise Unfit(f"BF16 needs opset {LEAST_OPSET}, and the model has {found}")
    return int(found)


def _takes_bf16(node: Any, opset: int) -> bool:
    """Whether ONNX has the operation in BF16 wherever it has FP32."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset)
    kinds = [set(each.allowed_type_strs) for each in schema.type_constraints]
    return all("tensor(bfloat16)" in each for each in kinds if "tensor(float)" in each)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and all of its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(graph: Any) -> Iterator[tuple[object, Any]]:
    """Yield all constants of a graph and its subgraphs, with where they are."""
    for each in _graphs(graph):
        for tensor in each.initializer:
            yield tensor.name, tensor
        for node in each.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield (node.name, attribute.name), attribute.t
