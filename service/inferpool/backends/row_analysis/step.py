"""One node of a graph, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from inferpool.backends.row_analysis.dims import Dim
from inferpool.backends.row_analysis.values import Shape, Value

Analyse: TypeAlias = Callable[[Any, Mapping[str, Value]], list[Value]]
"""Analyse a subgraph (a GraphProto) whose inputs have the given values; returns the values of its outputs."""


@dataclass(frozen=True, slots=True)
class Step:
    """One node with the values of its inputs.

    Attributes:
        operation: its name, with its domain unless that is ONNX's own.
        label: what reasons call the node.
        inputs: the values of its inputs, None for those that are left out.
        attributes: by name; subgraphs are GraphProtos.
        outputs: the names of its outputs; empty strings for those that are left out.
        opset: the version of the node's operation set.
        sizes: the sizes of its outputs as far as they are known beforehand, None for those that are not.
        analyse: how to analyse a subgraph.
    """

    operation: str
    label: str
    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    outputs: Sequence[str]
    opset: int
    sizes: Sequence[Sequence[Dim | None] | None]
    analyse: Analyse

    def input(self, index: int) -> Value | None:
        """Return the value of an input, None if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def required(self, index: int) -> Value:
        """Return the value of an input that the operation cannot do without: a valid model has it."""
        value = self.inputs[index]
        assert value is not None
        return value

    def given(self) -> list[Value]:
        """Return the values of the inputs that are not left out."""
        return [value for value in self.inputs if value is not None]

    def fresh(self, axis: int, output: int = 0) -> Dim:
        """Return the size of an output's axis: as inferred, else a symbol of its own."""
        inferred = self.sizes[output] if output < len(self.sizes) else None
        size = inferred[axis] if inferred is not None and axis < len(inferred) else None
        return size if size is not None else Dim(1, (f"{self.outputs[output]}.{axis}",))

    def inferred(self, output: int = 0) -> Shape | None:
        """Return the whole shape of an output, None if its rank is not known."""
        sizes = self.sizes[output] if output < len(self.sizes) else None
        return None if sizes is None else tuple(self.fresh(axis, output) for axis in range(len(sizes)))

    def settled(self, computed: Sequence[Dim] | None, output: int = 0) -> Shape | None:
        """Return the shape of an output: sizes as inferred, and as a rule has computed them otherwise."""
        sizes = self.sizes[output] if output < len(self.sizes) else None
        if computed is None or sizes is None or len(sizes) != len(computed):
            return self.inferred(output) if computed is None or sizes is not None else tuple(computed)
        return tuple(
            mine if mine is not None else theirs for mine, theirs in zip(sizes, computed, strict=True)
        )

    def integer(self, name: str, default: int) -> int:
        """Return an attribute that is an integer."""
        return int(self.attributes.get(name, default))

    def numbers(self, name: str, index: int | None) -> list[int] | None:
        """Return integers given by an attribute, or by the constant input `index`.

        Returns None if they are given, but are not known before the model runs; [] if they are not given.
        """
        if name in self.attributes:
            return [int(each) for each in self.attributes[name]]
        value = self.input(index) if index is not None else None
        if value is None:
            return []
        if value.constant is None:
            return None
        return [int(each) for each in np.asarray(value.constant).reshape(-1)]


Rule: TypeAlias = Callable[[Step], list[Value]]
"""Returns the values of an operation's outputs for the values of its inputs."""


def normal_axis(axis: int, rank: int) -> int:
    """Return an axis counted from the left."""
    return axis + rank if axis < 0 else axis
