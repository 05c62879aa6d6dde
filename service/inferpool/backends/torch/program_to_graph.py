"""Translates an exported program to a graph of TorchScript's runtime, which runs the graph without Python.

Every operation of a program is an operation of PyTorch with a schema, and so is every node of such a graph.
Sizes that are only known at run time are integers in the graph. Operations on functions, sizes that depend on
data, and state that changes have no equivalent in a graph and are not translated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

_INTEGERS: Final = {
    operator.add: "aten::add",
    operator.sub: "aten::sub",
    operator.mul: "aten::mul",
    operator.floordiv: "aten::floordiv",
    operator.mod: "aten::remainder",
    operator.neg: "aten::neg",
    torch.ops.aten.sym_size.int: "aten::size",
    torch.ops.aten.sym_numel.default: "aten::numel",
}
"""Operations on sizes that result in a size."""


class Untranslatable(Exception):
    """The program contains something that has no equivalent in a graph; the text names it."""


def translate(exported: Any) -> Any:
    """The program as a graph (`torch.Graph`), with the inputs in their order and one tuple of outputs.

    Raises Untranslatable.
    """
    try:
        translation = _Translation(exported)
        translation.graph.lint()
    except (RuntimeError, TypeError, KeyError) as error:  # raised by the graph's own checks
        raise Untranslatable(str(error)) from error
    aliases = translation.graph.alias_db()
    if any(aliases.has_writers(weight) for weight in translation.weights):
        raise Untranslatable("the program changes its own state")
    return translation.graph


def optimize(graph: Any) -> Any:
    """A copy with weights folded into one another, which saves work but rounds differently."""
    copy = graph.copy()
    torch._C._jit_pass_optimize_frozen_graph(copy, True)
    return copy


def function(graph: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function that runs `graph` without holding the interpreter lock."""
    made: Callable[..., tuple[torch.Tensor, ...]] = torch._C._create_function_from_graph("forward", graph)
    return made


def writes(graph: Any) -> bool:
    """Whether `graph` may write to its inputs."""
    aliases = graph.alias_db()
    return any(aliases.has_writers(value) for value in graph.inputs())


class _Translation:
    def __init__(self, exported: Any) -> None:
        self.graph = torch._C.Graph()
        self.weights: list[Any] = []
        self._values: dict[Node, Any] = {}
        self._exported = exported
        signature = exported.graph_signature
        for spec in signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise Untranslatable(f"the program changes {spec.target}")
        self._inputs = {spec.arg.name: spec for spec in signature.input_specs}
        steps = {
            "placeholder": self._placeholder,
            "call_function": self._call,
            "output": self._output,
        }
        for node in exported.graph.nodes:
            if node.op not in steps:
                raise Untranslatable(node.format_node())
            steps[node.op](node)

    def _placeholder(self, node: Node) -> None:
        spec = self._inputs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(node.meta["val"], torch.Tensor):
                value = self.graph.addInput(node.name)
                value.setType(torch._C.TensorType.get())
                self._values[node] = value
            return
        states = (self._exported.state_dict, self._exported.constants)
        weight = next(state[spec.target] for state in states if spec.target in state)
        if not isinstance(weight, torch.Tensor):
            raise Untranslatable(f"{spec.target} is not a tensor")
        self._values[node] = self.graph.insertConstant(weight.detach())
        self.weights.append(self._values[node])

    def _call(self, node: Node) -> None:
        target = node.target
        if target is operator.getitem:
            source, index = node.args
            made = self._values[source]
            if isinstance(made, list):
                self._values[node] = made[index]
            else:
                self._add(node, "aten::__getitem__", [made, self._value(index)], [torch._C.TensorType.get()])
        elif target in _INTEGERS:
            self._add(node, _INTEGERS[target], [*map(self._value, node.args)], [torch._C.IntType.get()])
        elif isinstance(target, torch._ops.OpOverload):
            schema = target._schema
            values = [
                self._value(_argument(node, index, of), of.type) for index, of in enumerate(schema.arguments)
            ]
            self._add(node, schema.name, values, [of.type for of in schema.returns])
        else:
            raise Untranslatable(node.format_node())

    def _output(self, node: Node) -> None:
        tensors = [self._values[value] for value in node.args[0] if isinstance(value, Node)]
        made = self.graph.insertNode(self.graph.create("prim::TupleConstruct", tensors, 1)).output()
        made.setType(torch._C.TupleType([tensor.type() for tensor in tensors]))
        self.graph.registerOutput(made)

    def _add(self, node: Node, kind: str, values: Sequence[Any], types: Sequence[Any]) -> None:
        made = self.graph.insertNode(self.graph.create(kind, values, len(types)))
        outputs = list(made.outputs())
        for output, of in zip(outputs, types, strict=True):
            output.setType(of)
        if made.schema() == "(no schema)":
            raise Untranslatable(node.format_node())
        self._values[node] = outputs[0] if len(outputs) == 1 else outputs

    def _value(self, value: Any, of: Any = None) -> Any:
        """An argument's value in the graph: a node's value, or a constant (of type `of` if given)."""
        if isinstance(of, torch._C.OptionalType) and value is not None:
            of = of.getElementType()
        if isinstance(value, Node):
            return self._values[value]
        if isinstance(value, (list, tuple)):
            element = of.getElementType() if isinstance(of, torch._C.ListType) else None
            values = [self._value(item, element) for item in value]
            made = self.graph.insertNode(self.graph.create("prim::ListConstruct", values, 1)).output()
            made.setType(torch._C.ListType(element if element is not None else values[0].type()))
            return made
        if isinstance(of, torch._C.FloatType) and isinstance(value, int):
            value = float(value)
        return self.graph.insertConstant(value)


def _argument(node: Node, index: int, of: Any) -> Any:
    if index < len(node.args) and not of.kwarg_only:
        return node.args[index]
    return node.kwargs.get(of.name, of.default_value)
