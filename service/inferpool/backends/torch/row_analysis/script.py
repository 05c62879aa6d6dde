"""Reads TorchScript files. They have to be loaded for it, so only trusted files are read.

The graph has no shapes. The ranks of the inputs come from `model.toml` and the golden samples; shapes inside
are known as far as the rules compute them, and numbers as far as they are computed of sizes and constants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from inferpool.backends.base import LoadOptions, TensorHint
from inferpool.backends.row_analysis.dims import ONE, Dim, minus, opaque, plus, product
from inferpool.backends.row_analysis.rules import verdict_of
from inferpool.backends.row_analysis.values import (
    Kind,
    Value,
    integers,
    joined,
    mixed,
    rowed,
    shared,
    unknown,
)
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.backends.torch.model import quiet
from inferpool.backends.torch.row_analysis.call import Call
from inferpool.backends.torch.row_analysis.rules import RULES, VIEWS, outputs_of
from inferpool.backends.torch.row_analysis.writes import Memory
from inferpool.backends.torch.signature import complete_inputs
from inferpool.tensors import ANY

_MOST_NODES: Final = 100_000
"""Nodes after which a graph is given up, counted as often as they are visited."""
_PYTHON: Final[Mapping[str, Callable[..., Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "div": operator.truediv,
    "remainder": operator.mod,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__not__": operator.not_,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
}
"""Operations on numbers."""
_SAME: Final = frozenset((
    "prim::NumToTensor", "prim::unchecked_cast", "aten::Int", "aten::IntImplicit", "aten::Float",
    "aten::Bool", "aten::FloatImplicit", "aten::ScalarImplicit", "prim::unchecked_unwrap_optional",
    "aten::_unwrap_optional",
))  # fmt: skip
"""Operations that pass a number on."""
_SILENT: Final = frozenset(
    ("prim::RaiseException", "prim::Print", "aten::warn", "aten::_assert", "prim::profile")
)
"""Operations without a result that matters. A row that is refused is found by running it alone."""
_OF_TENSOR: Final = frozenset((
    "prim::device", "prim::dtype", "prim::layout", "prim::is_cuda", "prim::requires_grad", "prim::is_sparse",
    "aten::is_floating_point", "aten::is_complex", "aten::device", "prim::is_quantized",
))  # fmt: skip
"""Properties of a tensor that do not depend on its content or its rows."""


class _Something:
    """A constant that the analysis has no use for, such as a device, or a condition that it cannot decide."""


_CONSTANT: Final = _Something()


def analyse_script(file: Path, options: LoadOptions) -> RowVerdict:
    """Analyse the TorchScript file `file`, whose inputs are described by `options`.

    Raises LoadError or RuntimeError if the file cannot be loaded, or its inputs are not described.
    """
    with quiet(file):
        module = torch.jit.load(str(file), map_location="cpu").eval()
        names, tensors = [], []
        for argument in module.forward.schema.arguments[1:]:
            if str(argument.type) != "Tensor":
                return RowVerdict(
                    Independence.UNKNOWN, f'TorchScript: input "{argument.name}" may be left out'
                )
            names.append(argument.name)
            tensors.append(TensorHint(argument.name))
        specs = {spec.name: spec for spec in complete_inputs(tensors, set(), options.inputs, options.samples)}
        with suppress(RuntimeError):
            module = torch.jit.freeze(module)
        graph = module.inlined_graph
        values: list[Value] = []
        for name in names:
            shape = specs[name].shape
            if shape is None:
                return RowVerdict(
                    Independence.UNKNOWN, f'TorchScript: the rank of input "{name}" is not known'
                )
            if not shape:
                return RowVerdict(Independence.MIXES, f'input "{name}" is one number for all rows')
            sizes = (
                Dim(1, (f"{name}.{axis}",)) if size == ANY else Dim(size) for axis, size in enumerate(shape)
            )
            values.append(rowed((ONE, *tuple(sizes)[1:]), 0))
        return analyse_graph(graph, values)


def analyse_graph(graph: Any, inputs: list[Value]) -> RowVerdict:
    """Analyse a graph (`torch.Graph`) whose inputs, after the module itself, have the given values."""
    walk = _Walk()
    names = [value.debugName() for value in graph.inputs()]
    walk.values.update(dict.fromkeys(names, _CONSTANT))
    walk.values.update(zip(names[len(names) - len(inputs) :], inputs, strict=True))
    walk.block(graph)
    outputs = [each for output in graph.outputs() for each in _leaves(walk.values[output.debugName()])]
    if walk.memory.spoiled is not None:
        outputs.append(walk.memory.spoiled)
    return verdict_of([(str(index), value) for index, value in enumerate(outputs)])


def _leaves(value: Any) -> Iterator[Value]:
    if isinstance(value, Value):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _leaves(each)
    elif value is not None:
        yield shared(())


class _Walk:
    """Carries values through the nodes of one graph."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._state: set[str] = set()
        self.memory = Memory(self._state)
        self._visited = 0

    def block(self, block: Any) -> None:
        """Go through a graph or a block of it."""
        for node in block.nodes():
            self._visited += 1
            names = [output.debugName() for output in node.outputs()]
            inputs = [self.values.get(value.debugName(), _CONSTANT) for value in node.inputs()]
            if self._visited > _MOST_NODES:
                results: list[Any] = [unknown("the graph is too large")] * len(names)
            else:
                results = self._node(node, names, inputs)
            self.values.update(zip(names, results, strict=True))

    def _node(self, node: Any, names: list[str], inputs: list[Any]) -> list[Any]:
        kind = node.kind()
        name = kind.rpartition("::")[2]
        if kind == "prim::Constant":
            return [self._constant(node, names[0])]
        if kind in _SILENT:
            return [_CONSTANT] * len(names)
        if kind in ("prim::ListConstruct", "prim::TupleConstruct"):
            return [list(inputs)]
        if kind == "prim::DictConstruct":
            return [dict(enumerate(inputs[1::2]))]
        if kind in ("prim::ListUnpack", "prim::TupleUnpack"):
            return self._unpacked(node, names, inputs[0])
        if kind in ("prim::TupleIndex", "aten::__getitem__") and isinstance(inputs[0], list):
            self._note(node, "alias", names)
            return [inputs[0][inputs[1]]] if isinstance(inputs[1], int) else [unknown(f"{name}: which one")]
        if kind == "prim::GetAttr":
            self._state.add(names[0])
            return [shared() if "Tensor" in str(node.output().type()) else _CONSTANT]
        if kind == "prim::SetAttr":
            self._spoil(mixed("the model changes its state with each run"))
            return []
        if kind == "prim::If":
            return self._choice(node, names, inputs[0])
        if kind == "prim::Loop" or list(node.blocks()):
            for block in node.blocks():
                if _writes_somewhere(block):
                    self._spoil(unknown(f"{name} writes to tensors"))
            return [next(_undecided(inputs), unknown(f"{name}: no rule for this operation"))] * len(names)
        if kind in _SAME and isinstance(inputs[0], (int, float, bool)):
            return [inputs[0]]
        if kind in _SAME or kind == "aten::item":
            return [_number(inputs[0], name)]
        if kind in _OF_TENSOR:
            return [_CONSTANT]
        found = self._of_sizes(node, name, inputs)
        return [found] if found is not None else self._call(node, name, names, inputs)

    def _constant(self, node: Any, name: str) -> Any:
        value = node.output().toIValue()
        if isinstance(value, torch.Tensor):
            self._state.add(name)
            return shared(tuple(map(Dim, value.shape)))
        if value is None or isinstance(value, (int, float, bool, str)):
            return value
        if isinstance(value, (list, tuple)) and all(isinstance(each, (int, float, bool)) for each in value):
            return list(value)
        return _CONSTANT

    def _unpacked(self, node: Any, names: list[str], source: Any) -> list[Any]:
        self._note(node, "alias", names)
        if isinstance(source, list) and len(source) == len(names):
            return source
        if isinstance(source, Value) and not source.is_decided:
            return [source] * len(names)
        return [unknown(f"{node.kind()}: how many there are is not known")] * len(names)

    def _note(self, node: Any, operation: str, names: list[str], *, writes: bool = False) -> None:
        first = next(iter(node.inputs()), None)
        self.memory.note(operation, None if first is None else first.debugName(), names, writes=writes)

    def _spoil(self, why: Value) -> None:
        self.memory.spoiled = self.memory.spoiled or why

    def _choice(self, node: Any, names: list[str], condition: Any) -> list[Any]:
        """If: by a condition that is known, or that all rows share."""
        blocks = list(node.blocks())
        if isinstance(condition, Value) and condition.kind is not Kind.SHARED:
            for block in blocks:
                if _writes_somewhere(block):
                    self._spoil(unknown("If: writes to tensors"))
            why = condition.reason or "If: one condition for all rows, which depends on the rows"
            return [condition if condition.kind is Kind.UNKNOWN else mixed(why)] * len(names)
        if isinstance(condition, (bool, int)):
            taken = blocks[0 if condition else 1]
            self.block(taken)
            return [self.values[output.debugName()] for output in taken.outputs()]
        both: list[list[Any]] = []
        for block in blocks:
            if _raises(block):  # the other block is the answer, if there is one
                continue
            if _writes_somewhere(block):
                self._spoil(unknown("If: writes to tensors in one case"))
            self.block(block)
            both.append([self.values.get(output.debugName()) for output in block.outputs()])
        if len(both) < 2:
            return both[0] if both else [unknown("If: both cases raise")] * len(names)
        return [_either(first, second, name) for first, second, name in zip(*both, names, strict=True)]

    def _of_sizes(self, node: Any, name: str, inputs: list[Any]) -> Any:
        """Return a number that is computed of sizes or constants, None if the node is about tensors."""
        if name == "size" and isinstance(inputs[0], Value):
            shape = inputs[0].shape
            if not inputs[0].is_decided or shape is None:
                return inputs[0] if not inputs[0].is_decided else unknown("size: the rank is not known")
            sizes = [integers((dim,), ()) for dim in shape]
            if len(inputs) == 1:
                return sizes
            return sizes[inputs[1]] if isinstance(inputs[1], int) else unknown("size: of which axis")
        if name in ("dim", "len", "numel"):
            if isinstance(inputs[0], list):
                return len(inputs[0])
            shape = inputs[0].shape if isinstance(inputs[0], Value) else None
            if shape is None:
                return unknown(f"{name}: the rank is not known")
            if name == "dim":
                return len(shape)
            return integers((shape[0] if name == "len" else product(shape),), ())
        if "Tensor" in str(node.output().type()) if node.outputsSize() == 1 else True:
            return None
        if name in ("__is__", "__isnot__") and any(each is None for each in inputs):
            return all(each is None for each in inputs) == (name == "__is__")
        if any(isinstance(each, (list, dict, _Something)) for each in inputs):
            return _CONSTANT
        if name in _PYTHON and not any(isinstance(each, Value) for each in inputs):
            with suppress(TypeError, ZeroDivisionError):
                return _PYTHON[name](*inputs)
        dims = [_dim(each) for each in inputs]
        if name in ("add", "sub", "mul", "floordiv") and all(dim is not None for dim in dims):
            return _arithmetic(name, *[dim for dim in dims if dim is not None])
        values = [each for each in inputs if isinstance(each, Value)]
        stopped = next(_undecided(values), None)
        if stopped is not None:
            return stopped
        if any(each.kind is Kind.ROWED for each in values):
            return mixed(f"{name} takes one number from all rows")
        counted = any(each.kind is Kind.COUNTED for each in values)
        return (
            Value(Kind.COUNTED, (), reason=f"{name} computes with the number of rows")
            if counted
            else shared(())
        )

    def _call(self, node: Any, name: str, names: list[str], inputs: list[Any]) -> list[Any]:
        """Return the values that a call of an operation makes."""
        text = node.schema()
        if text == "(no schema)":
            return [unknown(f"{name}: no rule for this operation")] * len(names)
        schema = torch._C.parse_schema(text)
        space = node.kind().partition("::")[0]
        writes = name.endswith("_") and not name.endswith("__")
        bare = name.removesuffix("_") if writes else name
        operation = bare if space in ("aten", "prim") else f"{space}.{bare}"
        arguments = {
            argument.name: None if isinstance(value, _Something) else value
            for argument, value in zip(schema.arguments, inputs, strict=False)
        }
        outputs, listed = names, False
        if len(names) == 1 and isinstance(node.output().type(), torch.ListType):
            listed = True
            count = next(
                (
                    use.user.outputsSize()
                    for use in node.output().uses()
                    if use.user.kind() == "prim::ListUnpack"
                ),
                0,
            )
            if not count:
                return [unknown(f"{name}: how many tensors it makes is not known")]
            outputs = [f"{names[0]}.{index}" for index in range(count)]
        call = Call(operation, schema.overload_name, name, arguments, outputs, [None] * len(outputs))
        results = outputs_of(call)
        self._note(node, operation, names, writes=writes)
        if writes:
            target = next(iter(node.inputs())).debugName()
            before, root = self.values.get(target), self.values.get(self.memory.root_of(target))
            if operation in VIEWS and "dropout" not in operation and operation != "detach":
                self._spoil(unknown(f"{name} changes the shape of a tensor"))
            elif isinstance(before, Value) and results:
                self.memory.write(name, target, before, results[0], root if isinstance(root, Value) else None)
            else:
                self._spoil(unknown(f"{name} writes to a list"))
        return [results] if listed else list(results)


def operations_without_rule(graph: Any) -> set[str]:
    """Return the operations on tensors of a graph that have no rule."""
    found = set()
    for node in _nodes(graph):
        space, _, name = node.kind().rpartition("::")
        makes = any("Tensor" in str(output.type()) for output in node.outputs())
        if space != "prim" and makes and name.removesuffix("_") not in RULES and name not in RULES:
            found.add(name)
    return found


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _raises(block: Any) -> bool:
    return any(node.kind() == "prim::RaiseException" for node in block.nodes())


def _writes_somewhere(block: Any) -> bool:
    return any(
        node.kind() == "prim::SetAttr"
        or (node.kind().startswith("aten::") and node.kind().endswith("_") and not node.kind().endswith("__"))
        for node in _nodes(block)
    )


def _undecided(values: Any) -> Iterator[Value]:
    for value in _leaves(values):
        if not value.is_decided:
            yield value


def _either(first: Any, second: Any, name: str) -> Any:
    if isinstance(first, Value) and isinstance(second, Value):
        return joined(first, second, name)
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [
            _either(left, right, f"{name}.{index}")
            for index, (left, right) in enumerate(zip(first, second, strict=True))
        ]
    same = type(first) is type(second) and not isinstance(first, (Value, list, dict)) and first == second
    if same or not any(isinstance(each, Value) for each in (first, second)):
        return first if same else _CONSTANT
    return unknown(f"{name} is of two kinds")


def _number(value: Any, name: str) -> Any:
    """Return a tensor of one number as a number."""
    if not isinstance(value, Value):
        return value
    if value.kind is Kind.ROWED:
        return mixed(f"{name} takes one number from all rows")
    return Value(value.kind, (), elements=value.elements, reason=value.reason)


def _dim(value: Any) -> Dim | None:
    if isinstance(value, Value):
        return value.elements[0] if value.elements is not None and len(value.elements) == 1 else None
    return Dim(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _arithmetic(name: str, left: Dim, right: Dim = ONE) -> Value:
    if name == "add":
        return integers((plus(left, right),), ())
    if name == "sub":
        return integers((minus(left, right),), ())
    if name == "mul":
        return integers((left.times(right),), ())
    if left.is_known and right.is_known and right.coefficient:
        return integers((Dim(left.coefficient // right.coefficient),), ())
    exact = left.over(right)
    return integers((exact if exact is not None else opaque("quotient", left, right),), ())
