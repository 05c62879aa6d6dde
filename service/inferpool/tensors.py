"""The vocabulary of tensors: datatypes, specs, signatures, and the check of one against the other.

Datatype names are those of the Open Inference Protocol v2 (`FP32`, `INT64`, `BYTES`, …). In memory a
tensor is a numpy array of the datatype's dtype, with two conventions: `BYTES` is an object array of
`str` (UTF-8 text, as ONNX Runtime takes it), and `BF16`, for which numpy has no type, is a `uint16`
array of the raw bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from inferpool.errors import InvalidInput

Array: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = dict[str, Array]

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
"""Datatype name to the numpy dtype that holds it."""

ANY: Final = -1
"""A dimension of any size."""

JSON: Final = "JSON"
"""The datatype of an output that is no tensor: a list, a mapping, arrays within them, or None.

Only outputs have it. It has no dtype and no shape, and no rows: a model that has one is not batched.
"""

ROUNDING: Final[Mapping[str, float]] = {"FP64": 1e-8, "FP32": 1e-4, "FP16": 2e-2, "BF16": 1e-1}
"""By datatype, the largest difference that counts as rounding, relative to the scale of the output.

Numbers of the other datatypes must be equal.
"""

_KEPT_CHARACTERS: Final = 100
_KEPT_NAMES: Final = 32
"""Of names, in a text for people: a client chooses its own, and a model may have thousands."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one input or output looks like.

    Attributes:
        name: as the model spells it.
        datatype: a key of `DTYPES`; of an output also `JSON`.
        shape: one size a dimension, `ANY` (-1) where it may vary; `()` is a scalar, and None a tensor
            of which the model does not say the rank.
        optional: an input that may be left out (the model has a default for it).
        symbols: the model's names of its dimensions, "" where one has none; empty where none has.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None
    optional: bool = False
    symbols: tuple[str, ...] = field(default=(), compare=False)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype that holds this tensor; raises KeyError where the datatype is `JSON`."""
        return DTYPES[self.datatype]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a version, in the model's order.

    Attributes:
        inputs: as requests name them.
        outputs: as answers name them.
        instead: the input, if any, that a request may send in place of all the others.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    instead: str | None = None

    @cached_property
    def inputs_by_name(self) -> Mapping[str, TensorSpec]:
        """The inputs, found by name."""
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def outputs_by_name(self) -> Mapping[str, TensorSpec]:
        """The outputs, found by name."""
        return {spec.name: spec for spec in self.outputs}

    @cached_property
    def single_input(self) -> TensorSpec | None:
        """The input that a body without names means: the only one needed."""
        if self.instead is not None:
            return self.inputs_by_name[self.instead]
        required = [spec for spec in self.inputs if not spec.optional]
        if len(self.inputs) == 1:
            return self.inputs[0]
        return required[0] if len(required) == 1 else None

    @cached_property
    def shared_symbols(self) -> Mapping[str, tuple[tuple[str, int], ...]]:
        """Dimensions that must be equal: the inputs and axes of each symbol that stands in several places."""
        places: dict[str, list[tuple[str, int]]] = {}
        for spec in self.inputs:
            for axis, symbol in enumerate(spec.symbols):
                if symbol:
                    places.setdefault(symbol, []).append((spec.name, axis))
        return {symbol: tuple(found) for symbol, found in places.items() if len(found) > 1}

    def is_optional(self, spec: TensorSpec) -> bool:
        """Whether a request may do without this input."""
        return spec.optional or self.instead is not None


def shape_text(shape: tuple[int, ...] | None) -> str:
    """A shape for people: `[-1, 3, 224]`, or `any` where the rank is unknown."""
    return "any" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


def name_text(name: str) -> str:
    """A name for people, quoted, its end cut off where it is long."""
    return f'"{_cut(name)}"'


def names_text(names: Collection[str]) -> str:
    """Names for people, each quoted: `"a", "b"`, or `none`; of very many, the first and how many more."""
    shown = ", ".join(map(name_text, islice(names, _KEPT_NAMES))) or "none"
    return shown if len(names) <= _KEPT_NAMES else f"{shown} and {len(names) - _KEPT_NAMES} more"


def _cut(name: str) -> str:
    return name if len(name) <= _KEPT_CHARACTERS else name[:_KEPT_CHARACTERS] + "…"


def check_tensor(spec: TensorSpec, tensor: Array) -> None:
    """Raise InvalidInput unless `tensor` has the datatype, rank and fixed dimensions of `spec`."""
    if tensor.dtype != spec.dtype:
        is_text = tensor.dtype == DTYPES["BYTES"]
        came = "strings" if is_text else str(tensor.dtype)
        raise InvalidInput(
            f'tensor "{spec.name}" is {came}, the model takes {spec.datatype}',
            tensor=spec.name,
            expected=spec.datatype,
            got="BYTES" if is_text else came,
        )
    expected = spec.shape
    if expected is None:
        return
    shape = tensor.shape
    if len(shape) == len(expected) and expected[:1] == (ANY,) and shape[1:] == expected[1:]:
        return  # open in rows alone, as most are: worth a look before the walk
    if len(shape) != len(expected) or any(
        want not in (ANY, got) for want, got in zip(expected, shape, strict=True)
    ):
        raise InvalidInput(
            f'tensor "{spec.name}" has shape {shape_text(shape)}, the model takes {shape_text(expected)}',
            tensor=spec.name,
            expected=list(expected),
            got=list(shape),
        )


def check_inputs(signature: Signature, tensors: Mapping[str, Array]) -> None:
    """Raise InvalidInput unless `tensors` are just what `signature` takes, no more and no less."""
    by_name = signature.inputs_by_name
    for name, tensor in tensors.items():
        spec = by_name.get(name)
        if spec is None:
            raise unknown_input(signature, name)
        check_tensor(spec, tensor)
    if signature.instead is not None and signature.instead in tensors:
        if len(tensors) > 1:
            others = [name for name in tensors if name != signature.instead]
            raise InvalidInput(
                f"tensor {name_text(signature.instead)} comes in place of every other; leave out"
                f" {names_text(others)}",
                tensor=signature.instead,
            )
        return
    if len(tensors) < len(by_name):
        for spec in signature.inputs:
            if spec.name not in tensors and not spec.optional and spec.name != signature.instead:
                raise InvalidInput(
                    f"tensor {name_text(spec.name)} is missing; the model takes {names_text(by_name)}",
                    tensor=spec.name,
                )
    if signature.shared_symbols:
        _check_symbols(signature, tensors)


def _check_symbols(signature: Signature, tensors: Mapping[str, Array]) -> None:
    """Raise InvalidInput where dimensions differ to which the model gives the same name."""
    for symbol, places in signature.shared_symbols.items():
        found = [(name, axis) for name, axis in places if name in tensors]
        if len({tensors[name].shape[axis] for name, axis in found}) > 1:
            (first, axis), (other, other_axis) = next(
                (found[0], place)
                for place in found
                if tensors[place[0]].shape[place[1]] != tensors[found[0][0]].shape[found[0][1]]
            )
            raise InvalidInput(
                f"tensor {name_text(first)} has shape {shape_text(tensors[first].shape)} and tensor"
                f" {name_text(other)} {shape_text(tensors[other].shape)}: dimension {axis} of the one and"
                f" {other_axis} of the other are the same, {name_text(symbol)}",
                tensor=other,
                expected=tensors[first].shape[axis],
                got=tensors[other].shape[other_axis],
            )


def check_outputs(signature: Signature, names: tuple[str, ...]) -> None:
    """Raise InvalidInput if a requested output is not one of the model's."""
    for name in names:
        if name not in signature.outputs_by_name:
            raise InvalidInput(
                f"no output is called {name_text(name)}; the model gives"
                f" {names_text(signature.outputs_by_name)}",
                tensor=_cut(name),
            )


def unknown_input(signature: Signature, name: str) -> InvalidInput:
    """The error for an input that the model does not have."""
    return InvalidInput(
        f"no input is called {name_text(name)}; the model takes {names_text(signature.inputs_by_name)}",
        tensor=_cut(name),
    )
