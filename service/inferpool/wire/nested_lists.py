"""Turns nested lists, as a JSON parser gives them, into the tensor that a spec asks for.

This is the reference: every faster way must give the same tensors and the same errors. The rules:

- A tensor is regular: all lists of one depth have the same length.
- Numbers become numeric datatypes only, and `true` and `false` become `BOOL` only.
- `null` stands for NaN in the datatypes of floating-point numbers, because answers write it so.
- An integer keeps its exact value. A float is rounded to the datatype's precision and must be in its range.
- A float with an integer value (`3.0`) is taken as an integer up to 2^53. Beyond 2^53 not every integer has a
  float of its own: the parser may have changed the value that was sent, so the number is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.tensors import (
    ANY,
    BF16_INFINITY,
    BF16_MAX,
    DTYPES,
    FLOATS,
    Array,
    TensorSpec,
    element_count,
    fp64_to_bf16,
    shape_text,
    value_text,
)

MAX_RANK: Final = 32
"""The deepest nesting of a tensor: numpy 1 has no more dimensions."""
EXACT_FLOAT: Final = 2**53
"""Up to this every integer has a float64 of its own (IEEE 754 binary64 has 53 bits of significand)."""

_FEW_NUMBERS: Final = 1024
"""Up to this many numbers, one dot product is cheaper than looking at each result of the cast."""
_SAFE_SQUARES: Final = {
    "FP16": 65504.0**2 / 2,
    "BF16": 3.38e38**2 / 2,
    "FP32": 3.4e38**2 / 2,
}
"""If the squares of the numbers sum to less than this, each number is in the range of the datatype."""
_NUMBERS: Final = frozenset((int, float))
_FLOATING: Final = frozenset((int, float, type(None)))
_BOOLEANS: Final = frozenset((bool,))
_STRINGS: Final = frozenset((str,))
_KIND_NAMES: Final = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "a string",
    type(None): "null",
}


def read_nested(spec: TensorSpec, value: object) -> Array:
    """Return `value`, lists in lists or a scalar, as a tensor in the datatype of `spec`.

    The caller checks the shape. Raises InvalidInput with the tensor, the position and the value at fault.
    """
    flat, shape, kinds = flatten(spec, value)
    return read_flat(spec, flat, shape, kinds)


def completed(spec: TensorSpec, tensor: Array) -> Array:
    """Return an empty `tensor` with the dimensions of `spec` that no list shows: `[]` is `[0, 64]`, too.

    A dimension of any size within an empty list has the size 0.
    """
    expected = spec.shape
    if expected is None or tensor.ndim >= len(expected):
        return tensor
    hidden = tuple(0 if size == ANY else size for size in expected[tensor.ndim :])
    return tensor.reshape(tensor.shape + hidden)


def in_shape(spec: TensorSpec, tensor: Array, shape: tuple[int, ...]) -> Array:
    """Return `tensor`, which is flat or has that shape already, in the `shape` that was sent with it.

    Raises InvalidInput if the elements do not fill the shape.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.ndim == 1 and tensor.size == element_count(shape):
        return tensor.reshape(shape)
    raise InvalidInput(
        f'tensor "{spec.name}" has data of shape {shape_text(tensor.shape)}, its "shape" is'
        f" {shape_text(shape)}",
        tensor=spec.name,
        expected=list(shape),
        got=list(tensor.shape),
    )


def flatten(spec: TensorSpec, value: object) -> tuple[list[Any], tuple[int, ...], set[type]]:
    """Return the elements of `value` in row-major order, their shape, and the types among them.

    Raises InvalidInput if `value` is ragged, mixes lists with other values, or is nested too deeply.
    """
    if not isinstance(value, list):
        return [value], (), {type(value)}
    level: list[Any] = value
    shape = [len(value)]
    while list in (kinds := set(map(type, level))):
        if len(kinds) > 1:
            raise _mixed(spec, level, shape)
        lengths = set(map(len, level))
        if len(lengths) > 1:
            raise _ragged(spec, level, shape)
        if len(shape) == MAX_RANK:
            raise InvalidInput(
                f'tensor "{spec.name}" is nested deeper than {MAX_RANK} lists', tensor=spec.name
            )
        shape.append(lengths.pop())
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))
    return level, tuple(shape), kinds


def read_flat(spec: TensorSpec, flat: list[Any], shape: tuple[int, ...], kinds: set[type]) -> Array:
    """Return the tensor of `shape` with the elements `flat`, whose types are `kinds`."""
    datatype = spec.datatype
    if datatype in FLOATS:
        # A scalar null is no number that a client has left open, but a tensor that it has left out.
        if not kinds <= _FLOATING or (not shape and flat[0] is None and spec.shape != ()):
            raise _wrong_kind(spec, "a number", flat, shape, _NUMBERS)
        wide = np.array(flat, dtype=np.float64)
        tensor = narrow_floats(wide, datatype)
        if tensor is None:
            position = int(np.flatnonzero(_overflows(_narrowed(wide, datatype), datatype))[0])
            raise out_of_range(spec, index_of(position, shape), flat[position])
        return tensor.reshape(shape)
    if datatype == "BOOL":
        if not kinds <= _BOOLEANS:
            raise _wrong_kind(spec, "true or false", flat, shape, _BOOLEANS)
        return np.array(flat, dtype=np.bool_).reshape(shape)
    if datatype == "BYTES":
        if not kinds <= _STRINGS:
            raise _wrong_kind(spec, "a string", flat, shape, _STRINGS)
        return np.array(flat, dtype=np.object_).reshape(shape)
    return _read_integers(spec, flat, shape, kinds)


def narrow_floats(wide: Array, datatype: str) -> Array | None:
    """Return float64 numbers rounded to `datatype`, NaN included; None if one is out of its range."""
    if datatype == "FP64":
        return wide
    # numpy's other products warn of an overflow; vdot does not.
    if wide.size <= _FEW_NUMBERS and np.vdot(wide, wide) < _SAFE_SQUARES[datatype]:
        return fp64_to_bf16(wide) if datatype == "BF16" else wide.astype(DTYPES[datatype])
    tensor = _narrowed(wide, datatype)
    return None if _overflows(tensor, datatype).any() else tensor


def narrow_integers(wide: Array, dtype: np.dtype[Any]) -> Array | None:
    """Return 64-bit integers in `dtype`; None if one is out of its range."""
    if dtype == wide.dtype or not wide.size:
        return wide.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    if int(wide.min()) < limits.min or int(wide.max()) > limits.max:
        return None
    return wide.astype(dtype)


def index_of(position: int, shape: Sequence[int]) -> list[int]:
    """Return the index, one number a dimension, of the element at `position` in row-major order."""
    index = []
    for size in reversed(shape):
        position, within = divmod(position, size)
        index.append(within)
    return index[::-1]


def out_of_range(spec: TensorSpec, index: list[int], value: object) -> InvalidInput:
    """Return the error for a number that the datatype of `spec` cannot hold.

    `value` is an `object`: in compiled code, a parameter of type `float` would turn an integer into a float,
    and the message would not show it as it was sent.
    """
    least: object = -BF16_MAX
    most: object = BF16_MAX
    if spec.datatype != "BF16":
        limits = np.finfo(spec.dtype) if spec.datatype in FLOATS else np.iinfo(spec.dtype)
        least, most = limits.min, limits.max
    got = value_text(value)
    return InvalidInput(
        f"{_element(spec, index)} is {got}, out of the range of {spec.datatype} ({least} to {most})",
        tensor=spec.name,
        index=index,
        value=got,
        expected=spec.datatype,
    )


def _narrowed(wide: Array, datatype: str) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return fp64_to_bf16(wide) if datatype == "BF16" else wide.astype(DTYPES[datatype])


def _overflows(tensor: Array, datatype: str) -> Array:
    """Return which numbers have become infinite; JSON has no infinity."""
    infinite: Array = (tensor & 0x7FFF) == BF16_INFINITY if datatype == "BF16" else np.isinf(tensor)
    return infinite


def _read_integers(spec: TensorSpec, flat: list[Any], shape: tuple[int, ...], kinds: set[type]) -> Array:
    if not kinds <= _NUMBERS:
        raise _wrong_kind(spec, "a number", flat, shape, _NUMBERS)
    integers = flat
    if float in kinds:
        for position, number in enumerate(flat):
            if type(number) is float and not (number.is_integer() and abs(number) <= EXACT_FLOAT):
                raise _not_an_integer(spec, flat, shape, position)
        integers = list(map(int, flat))
    limits = np.iinfo(spec.dtype)
    if integers and (min(integers) < limits.min or max(integers) > limits.max):
        position = next(i for i, number in enumerate(integers) if not limits.min <= number <= limits.max)
        raise out_of_range(spec, index_of(position, shape), flat[position])
    return np.array(integers, dtype=spec.dtype).reshape(shape)


def _element(spec: TensorSpec, index: list[int]) -> str:
    return f'tensor "{spec.name}" at {shape_text(tuple(index))}' if index else f'tensor "{spec.name}"'


def _wrong_kind(
    spec: TensorSpec, wanted: str, flat: list[Any], shape: tuple[int, ...], kinds: frozenset[type]
) -> InvalidInput:
    position = next(i for i, value in enumerate(flat) if type(value) not in kinds)
    index, got = index_of(position, shape), value_text(flat[position])
    return InvalidInput(
        f"{_element(spec, index)} is {got}; {spec.datatype} takes {wanted}",
        tensor=spec.name,
        index=index,
        value=got,
        expected=spec.datatype,
    )


def _not_an_integer(spec: TensorSpec, flat: list[Any], shape: tuple[int, ...], position: int) -> InvalidInput:
    index, number = index_of(position, shape), flat[position]
    why = "is too large a float to be exact" if number.is_integer() else "is not a whole number"
    got = value_text(number)
    return InvalidInput(
        f"{_element(spec, index)} is {got}, which {why}; {spec.datatype} takes integers",
        tensor=spec.name,
        index=index,
        value=got,
        expected=spec.datatype,
    )


def _mixed(spec: TensorSpec, level: list[Any], shape: list[int]) -> InvalidInput:
    position = next(i for i, value in enumerate(level) if type(value) is not type(level[0]))
    index = index_of(position, shape)
    first, other = (_KIND_NAMES[type(value)] for value in (level[0], level[position]))
    return InvalidInput(
        f"{_element(spec, index)} is {other}, but {shape_text(tuple(index_of(0, shape)))} is {first}:"
        " a list holds either lists or values",
        tensor=spec.name,
        index=index,
    )


def _ragged(spec: TensorSpec, level: list[Any], shape: list[int]) -> InvalidInput:
    expected = len(level[0])
    position = next(i for i, value in enumerate(level) if len(value) != expected)
    index = index_of(position, shape)
    return InvalidInput(
        f"{_element(spec, index)} is a list of {len(level[position])}, but"
        f" {shape_text(tuple(index_of(0, shape)))} is a list of {expected}: a tensor must be regular",
        tensor=spec.name,
        index=index,
        expected=expected,
        got=len(level[position]),
    )
