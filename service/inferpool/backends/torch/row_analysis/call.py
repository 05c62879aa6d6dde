"""One call of an ATen operation, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from inferpool.backends.row_analysis.dims import Dim
from inferpool.backends.row_analysis.rules import RULES, apply
from inferpool.backends.row_analysis.step import Step, normal_axis
from inferpool.backends.row_analysis.values import Kind, Shape, Value, constant, integers, shared, unknown

Argument: TypeAlias = Any
"""A Value, a number, a bool, a text, None, or a list of these."""
_OPSET: Final = 20
"""The version of ONNX's operations in whose vocabulary calls are expressed."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an operation with the values of its arguments.

    Attributes:
        operation: its name without namespace, overload and the mark of an operation that writes: `add`.
        overload: which of the operations with that name: `Tensor`.
        label: what reasons call it.
        arguments: by their names in the schema; those that have their default may be left out.
        outputs: the names of its outputs.
        sizes: the shapes of its outputs, None if they are not known beforehand.
        masks: the names of arguments that are, or hold, tensors of booleans; None if datatypes are not known.
    """

    operation: str
    overload: str
    label: str
    arguments: Mapping[str, Argument]
    outputs: Sequence[str]
    sizes: Sequence[Shape | None]
    masks: frozenset[str] | None = field(default=None)

    def tensors(self) -> list[Value]:
        """Return all values among the arguments: tensors, and numbers that are computed."""
        found: list[Value] = []
        for argument in self.arguments.values():
            found += [each for each in _flat(argument) if isinstance(each, Value)]
        return found

    def first(self) -> Value:
        """Return the tensor that the operation is mainly about; raises ValueError if there is none."""
        for argument in self.arguments.values():
            if isinstance(argument, Value):
                return argument
        raise ValueError("it has no tensor")

    def value(self, name: str) -> Value | None:
        """Return an argument that is a tensor or a number, None if it is left out."""
        argument = self.arguments.get(name)
        if argument is None or isinstance(argument, Value):
            return argument
        return constant(np.asarray(argument))

    def values(self, name: str) -> list[Value]:
        """Return an argument that is a list of tensors; raises ValueError if one is left out."""
        found = self.arguments.get(name) or []
        if isinstance(found, Value) or any(not isinstance(each, Value) for each in found):
            raise ValueError(f"{name} is no list of tensors")
        return list(found)

    def number(self, name: str, default: int | None = None) -> int:
        """Return an argument that is an integer; raises ValueError if it is not known beforehand."""
        return _known(name, self.arguments.get(name, default))

    def numbers(self, name: str) -> list[int] | None:
        """Return an argument that is a list of integers, or one of them; None if it is left out."""
        argument = self.arguments.get(name)
        return None if argument is None else [_known(name, each) for each in _flat(argument)]

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return an argument that is true or false; raises ValueError if it is not known beforehand."""
        argument = self.arguments.get(name)
        return default if argument is None else bool(_known(name, argument))

    def size_list(self, name: str) -> tuple[Dim, ...]:
        """Return an argument that is a list of sizes; raises ValueError if one is not known."""
        return tuple(_size(name, each) for each in _flat(self.arguments[name]))

    def fresh(self, axis: int, output: int = 0) -> Dim:
        """Return the size of an output's axis: as known, else a symbol of its own."""
        shape = self.shape(output)
        return shape[axis] if shape is not None else Dim(1, (f"{self.outputs[output]}.{axis}",))

    def shape(self, output: int = 0) -> Shape | None:
        """Return the shape of an output, None if it is not known."""
        return self.sizes[output] if output < len(self.sizes) else None

    def target(self, name: str) -> Value:
        """Return the shape of the output as integers: as known, else as the argument `name` has it."""
        shape = self.shape()
        elements = shape if shape is not None else self.size_list(name)
        return integers(elements, (Dim(len(elements)),))

    def step(self, operation: str, *inputs: Value | None, rank: int | None = None, **attributes: Any) -> Step:
        """Return the call as an operation of ONNX; outputs of unknown shape have `rank` axes."""
        sizes = [
            shape if shape is not None or rank is None else (None,) * rank
            for shape in (self.shape(output) for output in range(len(self.outputs)))
        ]
        return Step(
            operation,
            self.label,
            inputs,
            attributes,
            self.outputs,
            _OPSET,
            sizes,
            lambda _graph, _inputs: [unknown("a subgraph")],
        )

    def onnx(
        self, operation: str, *inputs: Value | None, rank: int | None = None, **attributes: Any
    ) -> list[Value]:
        """Return the values of the outputs by the rule of an operation of ONNX."""
        return apply(RULES[operation], self.step(operation, *inputs, rank=rank, **attributes))

    def every(self, value: Value) -> list[Value]:
        """Return the value for every output."""
        return [value] * len(self.outputs)

    def without_rows(self) -> list[Value]:
        """Return the outputs of an operation on values that no row has a part in."""
        return [shared(self.shape(output)) for output in range(len(self.outputs))]


CallRule: TypeAlias = Callable[[Call], list[Value]]
"""Returns the values of a call's outputs."""


def axes_of(value: Value, axes: Sequence[int]) -> set[int]:
    """Return axes counted from the left; raises ValueError if the rank is not known."""
    if value.shape is None:
        raise ValueError("the rank is not known")
    return {normal_axis(axis, len(value.shape)) for axis in axes}


def _flat(argument: Argument) -> list[Argument]:
    return list(argument) if isinstance(argument, (list, tuple)) else [argument]


def _known(name: str, argument: Argument) -> int:
    if isinstance(argument, Value):
        found = argument.elements
        if found is None or len(found) != 1 or not found[0].is_known or argument.kind is not Kind.SHARED:
            raise ValueError(f"{name} is not known before the model runs")
        return found[0].coefficient
    if argument is None:
        raise ValueError(f"{name} is left out")
    return int(argument)


def _size(name: str, argument: Argument) -> Dim:
    if isinstance(argument, Value):
        if argument.elements is None or len(argument.elements) != 1:
            raise ValueError(f"{name} is not known before the model runs")
        return argument.elements[0]
    return Dim(int(argument))
