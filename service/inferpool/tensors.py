"""Datatypes, tensor specs and signatures, and the checks of tensors against a signature.

Datatype names are those of the Open Inference Protocol v2 (`FP32`, `INT64`, `BYTES`, …). In memory a
tensor is a numpy array of the datatype's dtype, with two conventions: `BYTES` is an object array of
`str` (UTF-8 text, as ONNX Runtime takes it), and `BF16`, for which numpy has no type, is a `uint16`
array of the raw bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
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

FLOATS: Final = frozenset(("FP16", "BF16", "FP32", "FP64"))
"""The datatypes of floating-point numbers."""

BF16_INFINITY: Final = 0x7F80
"""The bits of infinity in BF16, without the sign."""

BF16_MAX: Final = 3.3895313892515355e38
"""The largest number of BF16."""

ANY: Final = -1
"""A dimension of any size."""

MOST_ROWS: Final = 1_000_000
"""Rows that a request may have. Rows without elements have no bytes, so no other limit holds for them."""

JSON: Final = "JSON"
"""The datatype of an output that is not a tensor: a list, a mapping, arrays within them, or None.

Only outputs have this datatype. Such an output has no dtype, shape or rows, so its model is not batched.
"""

ROUNDING: Final[Mapping[str, float]] = {"FP64": 1e-8, "FP32": 1e-4, "FP16": 2e-2, "BF16": 1e-1}
"""By datatype, the largest difference that counts as rounding, relative to the scale of the output.

Numbers of the other datatypes must be equal.
"""

_SHOWN_CHARACTERS: Final = 100
"""Characters of a name that a message shows, because clients choose names of any length."""
_SHOWN_VALUE_CHARACTERS: Final = 64
_SHOWN_NAMES: Final = 32
"""Names that a message lists, because a model may have thousands of inputs."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The name, datatype and shape of one input or output.

    Attributes:
        name: the name in the model.
        datatype: a key of `DTYPES`; for an output also `JSON`.
        shape: one size per dimension, `ANY` (-1) for a dimension of any size. `()` is a scalar; None
            means that the model leaves the rank open.
        optional: whether a request may omit this input, because the model has a default for it.
        symbols: the model's names of the dimensions, "" for a dimension without a name; empty if no
            dimension has one.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None
    optional: bool = False
    symbols: tuple[str, ...] = field(default=(), compare=False)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype that holds this tensor; raises KeyError if the datatype is `JSON`."""
        return DTYPES[self.datatype]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a version, in the model's order.

    Attributes:
        inputs: the inputs by their names in requests.
        outputs: the outputs by their names in responses.
        substitute_input: the name of an input that replaces all others, or None. A request sends either
            this input alone or the others.
        inputs_by_name: the inputs by name.
        outputs_by_name: the outputs by name.
        single_input: the input of a body without input names: the only one required, or None if there are
            several.
        shared_symbols: dimensions that must be equal: by symbol, the input names and axes of its dimensions.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    substitute_input: str | None = None
    # Dictionaries, because compiled code looks into a mapping by calling its methods.
    inputs_by_name: dict[str, TensorSpec] = field(init=False, repr=False, compare=False)
    outputs_by_name: Mapping[str, TensorSpec] = field(init=False, repr=False, compare=False)
    single_input: TensorSpec | None = field(init=False, repr=False, compare=False)
    shared_symbols: Mapping[str, tuple[tuple[str, int], ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look up once what every request needs. A cached property would be computed at each access."""
        inputs_by_name = {spec.name: spec for spec in self.inputs}
        for name, value in (
            ("inputs_by_name", inputs_by_name),
            ("outputs_by_name", {spec.name: spec for spec in self.outputs}),
            ("single_input", _single_input(self.inputs, inputs_by_name, self.substitute_input)),
            ("shared_symbols", _shared_symbols(self.inputs)),
        ):
            object.__setattr__(self, name, value)

    def is_optional(self, spec: TensorSpec) -> bool:
        """Whether a request may omit this input."""
        return spec.optional or self.substitute_input is not None


def _single_input(
    inputs: Collection[TensorSpec], by_name: Mapping[str, TensorSpec], substitute: str | None
) -> TensorSpec | None:
    if substitute is not None:
        return by_name.get(substitute)
    required = inputs if len(inputs) == 1 else [spec for spec in inputs if not spec.optional]
    return next(iter(required)) if len(required) == 1 else None


def _shared_symbols(inputs: Iterable[TensorSpec]) -> Mapping[str, tuple[tuple[str, int], ...]]:
    axes: dict[str, list[tuple[str, int]]] = {}
    for spec in inputs:
        for axis, symbol in enumerate(spec.symbols):
            if symbol:
                axes.setdefault(symbol, []).append((spec.name, axis))
    return {symbol: tuple(found) for symbol, found in axes.items() if len(found) > 1}


def shape_text(shape: tuple[int, ...] | None) -> str:
    """A shape for a message: `[-1, 3, 224]`, or `any` if the rank is open."""
    return "any" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


def name_text(name: str) -> str:
    """A name for a message: quoted, and shortened if it is long."""
    return f'"{_cut(name)}"'


def names_text(names: Collection[str]) -> str:
    """Names for a message: `"a", "b"`, or `none`; of very many, the first and the number of the others."""
    shown = ", ".join(map(name_text, islice(names, _SHOWN_NAMES))) or "none"
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"


def value_text(value: object) -> str:
    """Return a JSON value for messages, cut off if it is long; lists and objects are only named."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f'"{value[: _SHOWN_VALUE_CHARACTERS + 1]}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_VALUE_CHARACTERS + 2 else text[:_SHOWN_VALUE_CHARACTERS] + "…"


def element_count(shape: Iterable[int]) -> int:
    """Return how many elements a shape has, exactly, because Python's integers do not overflow."""
    count = 1
    for size in shape:
        count *= size
    return count


def bf16_to_fp32(bits: Array) -> Array:
    """Return the float32 numbers that raw bits of BF16 stand for; each has exactly the same value."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: Array) -> Array:
    """Return the raw bits of BF16 that are nearest to float32 numbers, ties to even."""
    bits = values.view(np.uint32)
    rounding = (bits >> 16 & 1) + np.uint32(0x7FFF)
    return (bits + rounding >> 16).astype(np.uint16)


def fp64_to_bf16(values: Array) -> Array:
    """Return the raw bits of BF16 that are nearest to float64 numbers, ties to even.

    A number beyond the range becomes an infinity, as in the conversions of numpy.
    """
    narrow = values.astype(np.float32)
    # A number close to the middle between two numbers of BF16 may have been rounded to the middle itself.
    middle = (narrow.view(np.uint32) & 0xFFFF) == 0x8000
    moved = middle & (narrow != values)
    if moved.any():
        away = np.where(values[moved] > narrow[moved], np.float32(np.inf), np.float32(-np.inf))
        narrow[moved] = np.nextafter(narrow[moved], away)
    return fp32_to_bf16(narrow)


def _cut(name: str) -> str:
    return name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "…"


def check_tensor(spec: TensorSpec, tensor: Array) -> None:
    """Raise InvalidInput unless `tensor` has the datatype, rank and fixed dimensions of `spec`."""
    dtype = spec.dtype
    if tensor.dtype is not dtype and tensor.dtype != dtype:
        is_text = tensor.dtype == DTYPES["BYTES"]
        came = "BYTES" if is_text else str(tensor.dtype)
        raise InvalidInput(
            f'tensor "{spec.name}" has the datatype {came}, the model takes {spec.datatype}',
            tensor=spec.name,
            expected=spec.datatype,
            got=came,
        )
    expected = spec.shape
    if expected is None:
        return
    shape = tensor.shape
    if not _fits(expected, shape):
        raise InvalidInput(
            f'tensor "{spec.name}" has shape {shape_text(shape)}, the model takes {shape_text(expected)}',
            tensor=spec.name,
            expected=list(expected),
            got=list(shape),
        )


def _fits(expected: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape has the rank and the fixed dimensions that are expected."""
    if len(shape) != len(expected):
        return False
    return all(want == ANY or want == shape[axis] for axis, want in enumerate(expected))


def check_inputs(signature: Signature, tensors: Tensors) -> None:
    """Raise InvalidInput unless `tensors` are the inputs of `signature`; optional inputs may be missing."""
    by_name = signature.inputs_by_name
    for name, tensor in tensors.items():
        spec = by_name.get(name)
        if spec is None:
            raise unknown_input(signature, name)
        check_tensor(spec, tensor)
    if signature.substitute_input is not None and signature.substitute_input in tensors:
        if len(tensors) > 1:
            others = [name for name in tensors if name != signature.substitute_input]
            raise InvalidInput(
                f"tensor {name_text(signature.substitute_input)} replaces all other inputs; leave out"
                f" {names_text(others)}",
                tensor=signature.substitute_input,
            )
        return
    if len(tensors) < len(by_name):
        for spec in signature.inputs:
            if spec.name not in tensors and not spec.optional and spec.name != signature.substitute_input:
                raise InvalidInput(
                    f"tensor {name_text(spec.name)} is missing; the model takes {names_text(by_name)}",
                    tensor=spec.name,
                )
    if signature.shared_symbols:
        _check_symbols(signature, tensors)


def _check_symbols(signature: Signature, tensors: Mapping[str, Array]) -> None:
    """Raise InvalidInput if dimensions differ that the model gives the same name."""
    for symbol, axes in signature.shared_symbols.items():
        sizes = [(name, axis, tensors[name].shape[axis]) for name, axis in axes if name in tensors]
        if len({size for _, _, size in sizes}) > 1:
            first, axis, expected = sizes[0]
            other, other_axis, got = next(each for each in sizes if each[2] != expected)
            raise InvalidInput(
                f"tensor {name_text(first)} has shape {shape_text(tensors[first].shape)} and tensor"
                f" {name_text(other)} {shape_text(tensors[other].shape)}; dimension {axis} of the first and"
                f" dimension {other_axis} of the second must be equal ({name_text(symbol)})",
                tensor=other,
                expected=expected,
                got=got,
            )


def check_outputs(signature: Signature, names: tuple[str, ...]) -> None:
    """Raise InvalidInput if the model lacks one of the requested outputs `names`."""
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
