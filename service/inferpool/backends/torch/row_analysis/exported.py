"""Reads exported programs (`torch.export.save`). Nothing of the file is run, and no weights are read.

The file has the graph as JSON: every operation with its arguments by name, and the shape of every tensor as
the exporter has found it, with sums and products of the sizes of the inputs.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from inferpool.backends.row_analysis.dims import Dim
from inferpool.backends.row_analysis.rules import verdict_of
from inferpool.backends.row_analysis.values import (
    Kind,
    Shape,
    Value,
    integers,
    joined,
    mixed,
    rowed,
    shared,
    unknown,
)
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.backends.torch.row_analysis.call import Call
from inferpool.backends.torch.row_analysis.rules import RULES, VIEWS, outputs_of
from inferpool.backends.torch.row_analysis.sizes import size_of, symbol_of
from inferpool.backends.torch.row_analysis.writes import Memory

_SCHEMA: Final = 8
"""The version of the JSON that is understood; PyTorch has written it since 2.6."""
_BOOL: Final = 12
"""The number that the JSON gives the datatype of booleans."""
_INLINED: Final = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "hints_wrapper", "invoke_subgraph")
"""Operations that run a subgraph as it is."""
_RESHAPES: Final = VIEWS - {"detach", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
"""Operations that change the shape of their target if they write to it."""
_CHECKS: Final = frozenset((
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_functional_assert_async",
    "sym_constrain_range", "sym_constrain_range_for_size", "_print", "_functional_sym_constrain_range",
))  # fmt: skip
"""Operations without a result. A row that fails a check is found by running it alone."""


def analyse_program(file: Path) -> RowVerdict:
    """Analyse the exported program in `file`.

    Raises OSError, KeyError or ValueError if the file is none that is understood.
    """
    with zipfile.ZipFile(file) as archive:
        graphs = [
            name
            for name in archive.namelist()
            if name.endswith(".json") and name.split("/")[1:2] == ["models"]
        ]
        if len(graphs) != 1:
            return RowVerdict(Independence.UNKNOWN, f"the file holds {len(graphs)} programs")
        return analyse(json.loads(archive.read(graphs[0])))


def analyse(program: Mapping[str, Any]) -> RowVerdict:
    """Analyse a program; rows lie along the first axis of each input. Raises KeyError if it is none."""
    version = program["schema_version"]["major"]
    if version != _SCHEMA:
        return RowVerdict(Independence.UNKNOWN, f"its graph has the version {version}, not {_SCHEMA}")
    module = program["graph_module"]
    graph, signature = module["graph"], module["signature"]
    state: set[str] = set()
    inputs: list[str] = []
    for spec in signature["input_specs"]:
        ((kind, content),) = spec.items()
        if kind == "user_input":
            if "as_tensor" in content["arg"]:
                inputs.append(content["arg"]["as_tensor"]["name"])
            elif "as_none" not in content["arg"]:
                inputs.append("")
        elif "arg" in content:
            state.add(content["arg"]["name"])
    rows: set[str] = set()
    for name in inputs:
        if not name:
            continue
        sizes = graph["tensor_values"][name]["sizes"]
        if not sizes:
            return RowVerdict(Independence.MIXES, f'input "{name}" is one number for all rows')
        symbol = symbol_of(sizes[0]["as_expr"]["expr_str"]) if "as_expr" in sizes[0] else None
        if symbol is None:
            return RowVerdict(Independence.UNKNOWN, f'input "{name}" was exported for a fixed number of rows')
        rows.add(symbol)
    walk = _Walk(frozenset(rows), state)
    values: dict[str, Value] = {}
    for name in inputs:
        if name:
            values[name] = rowed(walk.shape(graph["tensor_values"][name]), 0)
    for name in state:
        tensor = graph["tensor_values"].get(name)
        values[name] = shared(walk.shape(tensor) if tensor is not None else None)
    outputs = walk.graph(graph, values)
    if walk.memory.spoiled is not None:
        return verdict_of([("", walk.memory.spoiled)])
    changed = [spec for spec in signature["output_specs"] if not {"user_output", "loss_output"} & spec.keys()]
    if any(not {"token", "user_input_mutation"} & spec.keys() for spec in changed):
        return RowVerdict(Independence.MIXES, "the program changes the state of the model with each run")
    count = len(changed)  # changed state comes before what is returned
    named = [(str(index), value) for index, value in enumerate(outputs[count:]) if value is not None]
    return verdict_of(named)


def operations_of(program: Mapping[str, Any]) -> Iterator[str]:
    """Yield the operations of a program, subgraphs included, by the names that the rules have."""
    return _operations(program["graph_module"]["graph"])


def operations_without_rule(program: Mapping[str, Any]) -> set[str]:
    """Return the operations of a program that have no rule."""
    known = {*RULES, *_CHECKS, *_INLINED, "cond"}
    return {name for name in operations_of(program) if name not in known}


def _operations(graph: Mapping[str, Any]) -> Iterator[str]:
    for node in graph["nodes"]:
        target = node["target"]
        if not target.startswith(("torch.ops.aten.sym_", "_operator.", "torch.sym_", "math.")):
            yield _named(target)[0]
        for given in node["inputs"]:
            if "as_graph" in given["arg"]:
                yield from _operations(given["arg"]["as_graph"]["graph"])


def _named(target: str) -> tuple[str, str, bool]:
    """Return an operation's name, its overload, and whether it writes to its first argument."""
    parts = target.removeprefix("torch.ops.").split(".")
    space, name, overload = ("", parts[-1], "") if len(parts) < 3 else (parts[0], *parts[-2:])
    if parts[0] == "higher_order":
        return parts[-1], "", False
    writes = name.endswith("_") and not name.endswith("__")
    if writes:
        name = name.removesuffix("_")
    return (name if space in ("aten", "prims", "") else f"{space}.{name}"), overload, writes


class _Walk:
    """Carries values through the graph of one program."""

    def __init__(self, rows: frozenset[str], state: set[str]) -> None:
        self._rows = rows
        self.memory = Memory(state)

    def graph(self, graph: Mapping[str, Any], values: dict[str, Value]) -> list[Value | None]:
        """Return the values of a graph's outputs, None for constants; `values` are its inputs."""
        for node in graph["nodes"]:
            self._node(graph, node, values)
        return [self._output(each, values) for each in graph["outputs"]]

    def shape(self, tensor: Mapping[str, Any]) -> Shape:
        """Return the shape of a tensor as the exporter has found it."""
        return tuple(self._size(each) for each in tensor["sizes"])

    def _size(self, size: Mapping[str, Any]) -> Dim:
        if "as_int" in size:
            return Dim(int(size["as_int"]))
        return size_of(size["as_expr"]["expr_str"], self._rows)

    def _output(self, output: Mapping[str, Any], values: Mapping[str, Value]) -> Value | None:
        ((kind, content),) = output.items()
        if kind == "as_none":
            return None
        if kind == "as_tensor":
            found = values.get(content["name"])
        else:
            name = content.get("as_name") if isinstance(content, dict) else None
            found = values.get(name) if name else shared(())
        return found if found is not None else unknown("an output comes from nowhere")

    def _node(self, graph: Mapping[str, Any], node: Mapping[str, Any], values: dict[str, Value]) -> None:
        operation, overload, writes = _named(node["target"])
        if operation in _CHECKS:
            return
        outputs = _output_names(node)
        arguments = {
            given["name"] or str(index): self._argument(given["arg"], values)
            for index, given in enumerate(node["inputs"])
        }
        label = _label(operation, node)
        if node["target"].startswith(("torch.ops.aten.sym_", "_operator.", "torch.sym_", "math.")):
            results = [self._number(graph, name, arguments) for name in outputs]
        elif node["target"].startswith("torch.ops.higher_order."):
            results = self._subgraphs(operation, label, node, values, outputs)
        else:
            tensors = graph["tensor_values"]
            sizes = [self.shape(tensors[name]) if name in tensors else None for name in outputs]
            call = Call(operation, overload, label, arguments, outputs, sizes, _masks(graph, node))
            results = outputs_of(call)
            target = _first_tensor(node)
            self.memory.note(operation, target, outputs, writes=writes)
            if writes:
                if target is None or not results or operation in _RESHAPES:
                    self.memory.spoiled = self.memory.spoiled or unknown(
                        f"{label} changes more than one tensor's content"
                    )
                else:
                    root = values.get(self.memory.root_of(target))
                    self.memory.write(label, target, values[target], results[0], root)
            elif overload.startswith("out") or "out" in arguments:
                self.memory.spoiled = self.memory.spoiled or unknown(f"{label} writes to its arguments")
        values.update(zip(outputs, results, strict=False))

    def _argument(self, argument: Mapping[str, Any], values: Mapping[str, Value]) -> Any:
        ((kind, content),) = argument.items()
        if kind in ("as_none", "as_graph", "as_device", "as_layout", "as_memory_format", "as_operator"):
            return None
        if kind == "as_tensor":
            return values.get(content["name"], unknown("a tensor comes from nowhere"))
        if kind == "as_tensors":
            return [values.get(each["name"], unknown("a tensor comes from nowhere")) for each in content]
        if kind in ("as_optional_tensors", "as_nested_tensors"):
            return [self._argument(each, values) if isinstance(each, dict) else None for each in content]
        if kind == "as_optional_tensor":
            return self._argument(content, values)
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._symbol(content, values)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._symbol(each, values) for each in content]
        return content

    def _symbol(self, content: Mapping[str, Any], values: Mapping[str, Value]) -> Any:
        if "as_name" in content:
            return values.get(content["as_name"], unknown("a size comes from nowhere"))
        return next(iter(content.values()))

    def _number(self, graph: Mapping[str, Any], name: str, arguments: Mapping[str, Any]) -> Value:
        """Return a number that is computed of sizes."""
        for each in arguments.values():
            if isinstance(each, Value) and not each.is_decided:
                return each
        size = graph["sym_int_values"].get(name)
        if size is not None:
            return integers((self._size(size),), ())
        if any(
            isinstance(each, Value) and each.kind in (Kind.ROWED, Kind.COUNTED) for each in arguments.values()
        ):
            return Value(Kind.COUNTED, ())
        return shared(())

    def _subgraphs(
        self,
        operation: str,
        label: str,
        node: Mapping[str, Any],
        values: dict[str, Value],
        outputs: list[str],
    ) -> list[Value]:
        """Return the outputs of an operation that runs subgraphs."""
        graphs = [each["arg"]["as_graph"]["graph"] for each in node["inputs"] if "as_graph" in each["arg"]]
        if operation == "cond" and len(graphs) == 2:
            condition = self._argument(node["inputs"][0]["arg"], values)
            if isinstance(condition, Value) and condition.kind is not Kind.SHARED:
                if condition.kind is Kind.UNKNOWN:
                    return [condition] * len(outputs)
                why = condition.reason or f"{label}: one condition for all rows"
                return [mixed(why)] * len(outputs)
            given = self._operands(node["inputs"][3]["arg"], values)
            both = [self._inlined(graph, given) for graph in graphs]
            return [
                joined(first, second, name)
                for first, second, name in zip(both[0], both[1], outputs, strict=True)
            ]
        if operation in _INLINED and len(graphs) == 1:
            given = []
            past_graph = False
            for each in node["inputs"]:
                if "as_graph" in each["arg"]:
                    past_graph = True
                elif past_graph:
                    given += self._operands(each["arg"], values)
            return self._inlined(graphs[0], given)
        return [unknown(f"{label}: no rule for this operation")] * len(outputs)

    def _operands(self, argument: Mapping[str, Any], values: Mapping[str, Value]) -> list[Any]:
        found = self._argument(argument, values)
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def _inlined(self, graph: Mapping[str, Any], given: list[Any]) -> list[Value]:
        names = [_name_of(each) for each in graph["inputs"]]
        given = given[-len(names) :] if names else []
        inner = {
            name: value if isinstance(value, Value) else shared(())
            for name, value in zip(names, given, strict=True)
        }
        return [value if value is not None else shared(()) for value in self.graph(graph, inner)]


def _name_of(argument: Mapping[str, Any]) -> str:
    ((_, content),) = argument.items()
    return str(content.get("name") or content.get("as_name"))


def _output_names(node: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for output in node["outputs"]:
        ((kind, content),) = output.items()
        if kind == "as_none":
            names.append("")
        else:
            names += [
                _name_of({kind: each}) for each in (content if isinstance(content, list) else [content])
            ]
    return names


def _first_tensor(node: Mapping[str, Any]) -> str | None:
    for given in node["inputs"]:
        for kind in ("as_tensor", "as_tensors"):
            if kind in given["arg"]:
                content = given["arg"][kind]
                return str(content["name"]) if kind == "as_tensor" else None
    return None


def _masks(graph: Mapping[str, Any], node: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of arguments that are, or hold, tensors of booleans."""
    found = set()
    for given in node["inputs"]:
        text = [given["arg"]]
        while text:
            each = text.pop()
            if isinstance(each, list):
                text += each
            elif isinstance(each, dict):
                name = each.get("name")
                tensor = graph["tensor_values"].get(name) if isinstance(name, str) else None
                if tensor is not None and tensor["dtype"] in (_BOOL, 1):
                    found.add(given["name"])
                text += [content for content in each.values() if isinstance(content, (list, dict))]
    return frozenset(found)


def _label(operation: str, node: Mapping[str, Any]) -> str:
    """Return what reasons call a node: its operation, and the module that it is part of."""
    stack = (node.get("metadata") or {}).get("nn_module_stack", "")
    path = stack.split(";")[-1].split(",")
    module = path[1] if len(path) > 2 and not path[1].startswith("_empty") else ""
    return f'{operation} "{module}"' if module else operation
