"""Nested lists, as a JSON parser gives them, to the tensor that a spec asks for.

This is the reference that every faster way must agree with, value for value and error for error. The
rules: a tensor is regular, numbers go to numeric datatypes only and `true`/`false` to `BOOL` only, an
integer keeps its exact value, a float is rounded to the datatype's precision and must stay within its
range. A float that holds an integer (`3.0`) is an integer as long as every integer near it has a float of
its own, which is up to 2^53; beyond, the text's value is already lost and the number is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.tensors import Array, TensorSpec, shape_text

MAX_RANK: Final = 32
"""Deepest nesting that is a tensor: numpy 1 allows no more dimensions."""
EXACT_FLOAT: Final = 2**53
"""Up to this every integer has a float64 of its own (IEEE 754 binary64 has 53 bits of significand)."""

_FEW: Final = 1024
"""Up to this many numbers one dot product costs less than a look at each result of the cast."""
_SAFE_SQUARES: Final = {
    np.dtype(np.float16): 65504.0**2 / 2,
    np.dtype(np.float32): 3.4e38**2 / 2,
}
"""Where the squares of some numbers sum to less than this, each number is within the dtype's range."""
FLOATS: Final = frozenset(("FP16", "FP32", "FP64"))
_NUMBERS: Final = frozenset((int, float))
_KIND_NAMES: Final = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "a string",
    type(None): "null",
}
_KEPT_TEXT: Final = 64


def read_nested(spec: TensorSpec, value: object) -> Array:
    """The tensor that `value` (lists in lists, or a scalar) spells, in the datatype of `spec`.

    Whether its shape is the spec's is for the caller to check. Raises InvalidInput naming the tensor, and
    the position and value where one is at fault.
    """
    flat, shape, kinds = flatten(spec, value)
    return read_flat(spec, flat, shape, kinds)


def fit(spec: TensorSpec, tensor: Array, shape: tuple[int, ...]) -> Array:
    """`tensor` in the `shape` that was sent with it: it has that shape already, or is flat.

    Raises InvalidInput where the elements do not fill the shape.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.ndim == 1 and tensor.size == product(shape):
        return tensor.reshape(shape)
    raise InvalidInput(
        f'tensor "{spec.name}" has data of shape {shape_text(tensor.shape)}, its "shape" is'
        f" {shape_text(shape)}",
        tensor=spec.name,
        expected=list(shape),
        got=list(tensor.shape),
    )


def flatten(spec: TensorSpec, value: object) -> tuple[list[Any], tuple[int, ...], set[type]]:
    """The elements of `value` in row-major order, the shape they had, and the types among them.

    Raises InvalidInput where `value` is ragged, mixes lists with values, or is nested too deeply.
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
    """The tensor of `shape` that holds `flat`, whose elements are of the types `kinds`."""
    datatype = spec.datatype
    if datatype in FLOATS:
        if not kinds <= _NUMBERS:
            raise _wrong_kind(spec, "a number", flat, shape, _NUMBERS)
        wide = np.array(flat, dtype=np.float64)
        tensor = narrow_floats(wide, spec.dtype)
        if tensor is None:
            place = int(np.flatnonzero(~np.isfinite(_narrowed(wide, spec.dtype)))[0])
            raise out_of_range(spec, index_of(place, shape), flat[place])
        return tensor.reshape(shape)
    if datatype == "BOOL":
        if not kinds <= {bool}:
            raise _wrong_kind(spec, "true or false", flat, shape, frozenset((bool,)))
        return np.array(flat, dtype=np.bool_).reshape(shape)
    if datatype == "BYTES":
        if not kinds <= {str}:
            raise _wrong_kind(spec, "a string", flat, shape, frozenset((str,)))
        return np.array(flat, dtype=np.object_).reshape(shape)
    if datatype == "BF16":
        raise InvalidInput(
            f'tensor "{spec.name}" is BF16, which JSON cannot carry: send it in the binary form of /v2',
            tensor=spec.name,
            expected="BF16",
        )
    return _read_integers(spec, flat, shape, kinds)


def narrow_floats(wide: Array, dtype: np.dtype[Any]) -> Array | None:
    """Finite float64 numbers in `dtype`, rounded; None where one is out of its range."""
    if dtype == wide.dtype:
        return wide
    # vdot, for it alone does not warn of an overflow.
    if wide.size <= _FEW and np.vdot(wide, wide) < _SAFE_SQUARES[dtype]:
        return wide.astype(dtype)
    tensor = _narrowed(wide, dtype)
    return tensor if np.isfinite(tensor).all() else None


def narrow_integers(wide: Array, dtype: np.dtype[Any]) -> Array | None:
    """64-bit integers in `dtype`; None where one is out of its range."""
    if dtype == wide.dtype or not wide.size:
        return wide.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    if int(wide.min()) < limits.min or int(wide.max()) > limits.max:
        return None
    return wide.astype(dtype)


def bf16_to_fp32(bits: Array) -> Array:
    """The float32 numbers whose upper halves are `bits`: each is just the BF16 number's value."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def value_text(value: object) -> str:
    """A value for an error's text and members: short, whatever was sent."""
    if isinstance(value, (list, dict)):
        return _KIND_NAMES[type(value)]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f'"{value[: _KEPT_TEXT + 1]}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= _KEPT_TEXT + 2 else text[:_KEPT_TEXT] + "…"


def product(shape: Iterable[int]) -> int:
    """How many elements a shape has, exactly: Python's integers do not overflow."""
    count = 1
    for size in shape:
        count *= size
    return count


def index_of(place: int, shape: Sequence[int]) -> list[int]:
    """The position, one number a dimension, of element `place` in row-major order."""
    index = []
    for size in reversed(shape):
        place, within = divmod(place, size)
        index.append(within)
    return index[::-1]


def out_of_range(spec: TensorSpec, index: list[int], value: object) -> InvalidInput:
    """The error for a number that the datatype of `spec` cannot hold.

    Compiled, a `float` would make a float of an integer, and it would not be named as it was sent.
    """
    limits = np.finfo(spec.dtype) if spec.datatype in FLOATS else np.iinfo(spec.dtype)
    got = value_text(value)
    return InvalidInput(
        f"{_element(spec, index)} is {got}, out of the range of {spec.datatype}"
        f" ({limits.min} to {limits.max})",
        tensor=spec.name,
        index=index,
        value=got,
        expected=spec.datatype,
    )


def _narrowed(wide: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return wide.astype(dtype)


def _read_integers(spec: TensorSpec, flat: list[Any], shape: tuple[int, ...], kinds: set[type]) -> Array:
    if not kinds <= _NUMBERS:
        raise _wrong_kind(spec, "a number", flat, shape, _NUMBERS)
    whole = flat
    if float in kinds:
        for place, number in enumerate(flat):
            if type(number) is float and not (number.is_integer() and abs(number) <= EXACT_FLOAT):
                raise _not_whole(spec, flat, shape, place)
        whole = list(map(int, flat))
    limits = np.iinfo(spec.dtype)
    if whole and (min(whole) < limits.min or max(whole) > limits.max):
        place = next(i for i, number in enumerate(whole) if not limits.min <= number <= limits.max)
        raise out_of_range(spec, index_of(place, shape), flat[place])
    return np.array(whole, dtype=spec.dtype).reshape(shape)


def _element(spec: TensorSpec, index: list[int]) -> str:
    return f'tensor "{spec.name}" at {shape_text(tuple(index))}' if index else f'tensor "{spec.name}"'


def _wrong_kind(
    spec: TensorSpec, wanted: str, flat: list[Any], shape: tuple[int, ...], kinds: frozenset[type]
) -> InvalidInput:
    place = next(i for i, value in enumerate(flat) if type(value) not in kinds)
    index, got = index_of(place, shape), value_text(flat[place])
    return InvalidInput(
        f"{_element(spec, index)} is {got}; {spec.datatype} takes {wanted}",
        tensor=spec.name,
        index=index,
        value=got,
        expected=spec.datatype,
    )


def _not_whole(spec: TensorSpec, flat: list[Any], shape: tuple[int, ...], place: int) -> InvalidInput:
    index, got = index_of(place, shape), value_text(flat[place])
    why = "is not a whole number" if not flat[place].is_integer() else "is too large a float to be exact"
    return InvalidInput(
        f"{_element(spec, index)} is {got}, which {why}; {spec.datatype} takes integers",
        tensor=spec.name,
        index=index,
        value=got,
        expected=spec.datatype,
    )


def _mixed(spec: TensorSpec, level: list[Any], shape: list[int]) -> InvalidInput:
    place = next(i for i, value in enumerate(level) if type(value) is not type(level[0]))
    index = index_of(place, shape)
    first, other = (_KIND_NAMES[type(value)] for value in (level[0], level[place]))
    return InvalidInput(
        f"{_element(spec, index)} is {other}, where {shape_text(tuple(index_of(0, shape)))} is {first}:"
        " lists and values do not mix",
        tensor=spec.name,
        index=index,
    )


def _ragged(spec: TensorSpec, level: list[Any], shape: list[int]) -> InvalidInput:
    expected = len(level[0])
    place = next(i for i, value in enumerate(level) if len(value) != expected)
    index = index_of(place, shape)
    return InvalidInput(
        f"{_element(spec, index)} is a list of {len(level[place])}, where"
        f" {shape_text(tuple(index_of(0, shape)))} is a list of {expected}: a tensor is not ragged",
        tensor=spec.name,
        index=index,
        expected=expected,
        got=len(level[place]),
    )
