"""The walk over a graph: which axis of each value holds the rows, and so whether an answer is a row's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from inferpool.backends.onnx.row_analysis import control_flow
from inferpool.backends.onnx.row_analysis.graph_file import read_graph
from inferpool.backends.row_analysis import rules
from inferpool.backends.row_analysis.dims import ONE, Dim
from inferpool.backends.row_analysis.mixing import RANDOM
from inferpool.backends.row_analysis.step import Rule, Step
from inferpool.backends.row_analysis.values import (
    Kind,
    Value,
    constant,
    rowed,
    shared,
    unknown,
)
from inferpool.backends.row_verdict import Independence, RowVerdict

RULES: Final[Mapping[str, Rule]] = {**rules.RULES, **control_flow.RULES}
"""The rule of each operation, by its name: with its domain unless that is ONNX's own."""

_MOST_FOLDED: Final = 4096
"""Elements up to which constants are kept and computed with; shapes are short, and weights are not needed."""
_OF_FILLED_ROWS: Final = frozenset(("Flatten", "TfIdfVectorizer"))
"""Operations whose rules know rows that are filled up to the longest."""


def analyse_file(file: Path) -> RowVerdict:
    """Analyse the model in `file`; no large weights are read, in the file or beside it.

    Raises ValueError, OSError or DecodeError for a file that is no model.
    """
    return analyse(read_graph(file))


def analyse(model: ModelProto) -> RowVerdict:
    """Analyse a model, whose rows lie along the first axis of each input.

    An answer is independent if every output has the rows on its first axis, one by one and in their order,
    and no operation on the way lets rows depend on one another. The verdict is about what operations are
    defined to do; a runtime may still round a sum differently in another batch size.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    given = {each.name for each in model.graph.initializer}
    inputs: dict[str, Value] = {}
    for each in model.graph.input:
        if each.name in given:
            continue
        if not each.type.HasField("tensor_type") or not each.type.tensor_type.HasField("shape"):
            return RowVerdict(Independence.UNKNOWN, f'the rank of input "{each.name}" is not known')
        sizes = each.type.tensor_type.shape.dim
        if not sizes:
            return RowVerdict(Independence.MIXES, f'input "{each.name}" is one number for all rows')
        # A name that is given to two sizes need not mean that they are equal: each is a size of its own.
        shape = [
            Dim(size.dim_value) if size.HasField("dim_value") else Dim(1, (f"{each.name}.{axis}",))
            for axis, size in enumerate(sizes)
        ]
        inputs[each.name] = rowed((ONE, *shape[1:]), 0)
    walk = _Walk(model)
    outputs = walk.graph(model.graph, inputs, {})
    names = [each.name for each in model.graph.output]
    return rules.verdict_of(list(zip(names, outputs, strict=True)))


def operations_without_rule(model: ModelProto) -> set[str]:
    """Return the operations of a model, subgraphs included, that have no rule."""
    found: set[str] = set()

    def visit(graph: GraphProto) -> None:
        for node in graph.node:
            if operation_of(node) not in RULES and operation_of(node) != "Constant":
                found.add(operation_of(node))
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(onnx.inliner.inline_local_functions(model).graph if model.functions else model.graph)
    return found


def operation_of(node: NodeProto) -> str:
    """Return the name of a node's operation: with its domain unless that is ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


class _Walk:
    """Carries values through one model's graph."""

    def __init__(self, model: ModelProto) -> None:
        self._opsets = {each.domain or "ai.onnx": each.version for each in model.opset_import}
        self._sizes = _inferred_sizes(model)

    def graph(
        self, graph: GraphProto, inputs: Mapping[str, Value], outer: Mapping[str, Value]
    ) -> list[Value]:
        """Return the values of a graph's outputs; `outer` are the values of the graphs around it."""
        values: dict[str, Value] = {**outer, **inputs}
        for tensor in graph.initializer:
            if tensor.name not in inputs:
                values[tensor.name] = _of_tensor(tensor)
        for sparse in graph.sparse_initializer:
            values[sparse.values.name] = shared(tuple(map(Dim, sparse.dims)))
        for node in graph.node:
            results = self._node(node, values)
            values.update((name, value) for name, value in zip(node.output, results, strict=False) if name)
        return [
            values.get(each.name, unknown(f'output "{each.name}" comes from nowhere'))
            for each in graph.output
        ]

    def _node(self, node: NodeProto, values: Mapping[str, Value]) -> list[Value]:
        operation = operation_of(node)
        count = len(node.output)
        label = f'{operation.rpartition(".")[2]} "{node.name}"' if node.name else operation.rpartition(".")[2]
        if operation == "Constant":
            return [_of_constant(node)]
        inputs = [values.get(name) if name else None for name in node.input]
        if any(value is None and name for value, name in zip(inputs, node.input, strict=True)):
            return [unknown(f"{label}: an input comes from nowhere")] * count
        given = [value for value in inputs if value is not None]
        filled = len(given) == 1 and given[0].filler is not None and operation in _OF_FILLED_ROWS
        stopped = None if filled else rules.undecided(given)
        if stopped is not None:
            return [stopped] * count
        rule = RULES.get(operation)
        subgraphs = any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute)
        if not subgraphs and operation not in RANDOM and all(each.constant is not None for each in given):
            folded = self._folded(node, given) if all(name for name in node.input) else None
            if folded is not None:
                return folded
        if rule is None:
            if all(value.kind is Kind.SHARED for value in given) and node.domain in (
                "",
                "ai.onnx",
                "ai.onnx.ml",
            ):
                return [shared() for _ in node.output]
            return [unknown(f"{label}: no rule for this operation")] * count
        step = Step(
            operation,
            label,
            inputs,
            {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute},
            list(node.output),
            self._opsets.get(node.domain or "ai.onnx", 1),
            [self._sizes.get(name) for name in node.output],
            partial(self._subgraph, values),
        )
        return rules.apply(rule, step)

    def _subgraph(
        self, outer: Mapping[str, Value], graph: GraphProto, inputs: Mapping[str, Value]
    ) -> list[Value]:
        return self.graph(graph, inputs, outer)

    def _folded(self, node: NodeProto, given: Sequence[Value]) -> list[Value] | None:
        """Return what a node makes of constants, None if that is too much or cannot be computed."""
        arrays = [value.constant for value in given]
        if sum(array.size for array in arrays if array is not None) > _MOST_FOLDED:
            return None
        try:
            opsets = [onnx.helper.make_opsetid("" if name == "ai.onnx" else name, version)
                      for name, version in self._opsets.items()]  # fmt: skip
            names = [f"i{index}" for index in range(len(arrays))]
            copy = NodeProto()
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend(names)
            graph = onnx.helper.make_graph(
                [copy],
                "one",
                [onnx.helper.make_empty_tensor_value_info(name) for name in names],
                [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name],
            )
            run = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
            results = iter(run.run(None, dict(zip(names, arrays, strict=True))))
        except Exception:  # noqa: BLE001 - a reference that cannot compute it leaves it to the rules
            return None
        folded: list[Value] = []
        for name in node.output:
            array = np.asarray(next(results)) if name else np.empty(0)
            folded.append(
                constant(array) if array.size <= _MOST_FOLDED else shared(tuple(map(Dim, array.shape)))
            )
        return folded


def _of_tensor(tensor: TensorProto) -> Value:
    elements = int(np.prod(tensor.dims, dtype=np.int64))
    if elements <= _MOST_FOLDED and tensor.data_location != TensorProto.EXTERNAL:
        return constant(onnx.numpy_helper.to_array(tensor))
    return shared(tuple(map(Dim, tensor.dims)))


def _of_constant(node: NodeProto) -> Value:
    value: Any = onnx.helper.get_attribute_value(node.attribute[0])
    if isinstance(value, TensorProto):
        return _of_tensor(value)
    if isinstance(value, onnx.SparseTensorProto):
        return shared(tuple(map(Dim, value.dims)))
    return constant(np.asarray(value))


def _inferred_sizes(model: ModelProto) -> dict[str, tuple[Dim | None, ...]]:
    """Return the sizes of values as far as shape inference knows them; what files declare is not believed."""
    copy = _without_weights(model)
    _forget(copy.graph)
    for each in copy.graph.output:
        each.type.tensor_type.ClearField("shape")
    try:
        copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except Exception:  # noqa: BLE001 - without inferred ranks most verdicts are "unknown"
        return {}
    found: dict[str, tuple[Dim | None, ...]] = {}

    def visit(graph: GraphProto) -> None:
        for each in (*graph.value_info, *graph.output):
            if each.type.HasField("tensor_type") and each.type.tensor_type.HasField("shape"):
                found[each.name] = tuple(
                    Dim(size.dim_value) if size.HasField("dim_value") else None
                    for size in each.type.tensor_type.shape.dim
                )
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(copy.graph)
    return found


def _without_weights(model: ModelProto) -> ModelProto:
    """Return a copy whose large weights are inputs: copying them takes most of the time."""
    graph = model.graph
    large = [each for each in graph.initializer if int(np.prod(each.dims, dtype=np.int64)) > _MOST_FOLDED]
    names = {each.name for each in large}
    given = {each.name for each in graph.input}
    copy = ModelProto()
    for field, value in model.ListFields():
        if field.name not in ("graph", "training_info"):
            _set(copy, field, value)
    for field, value in graph.ListFields():
        if field.name != "initializer":
            _set(copy.graph, field, value)
    copy.graph.initializer.extend(each for each in graph.initializer if each.name not in names)
    copy.graph.input.extend(
        onnx.helper.make_tensor_value_info(each.name, each.data_type, list(each.dims))
        for each in large
        if each.name not in given
    )
    return copy


def _set(message: Any, field: Any, value: Any) -> None:
    """Set a field of a protobuf message to a copy of `value`."""
    if field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _forget(graph: GraphProto) -> None:
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _forget(attribute.g)
