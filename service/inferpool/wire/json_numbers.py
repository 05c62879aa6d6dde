"""Reads lists of numbers straight from a JSON body into tensors.

`_json_numbers`, a module in C, takes the lists of numbers out of a body and leaves a mark in place of each.
orjson reads the remainder, so it judges everything that is not a list of numbers. Bodies that this module
does not take are read by orjson and `inferpool.wire.nested_lists` instead, which also word all errors. Both
ways give the same tensors. The GIL is released while a large body is read, so it delays no other request.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

import numpy as np
import orjson

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.tensors import FLOATS, Array, TensorSpec
from inferpool.wire.json_bounds import COUNTED_BYTES, check_json
from inferpool.wire.nested_lists import EXACT_FLOAT, narrow_floats, narrow_integers, read_nested

try:
    from inferpool.wire import _json_numbers
except ImportError:  # the package was built without a C compiler
    _json_numbers = None  # type: ignore[assignment]

AVAILABLE: bool = _json_numbers is not None
"""Whether to use the module in C. Tests and benchmarks set it to choose how bodies are read."""

_MARK: Final = secrets.token_hex(8)
"""Stands for a list in the remainder. It is random, so that no client can send it."""
_MARK_BYTES: Final = _MARK.encode()
_ONLY_INPUTS: Final = frozenset(
    text % _MARK_BYTES for text in (b'{"inputs":["%s0"]}', b'{"inputs": ["%s0"]}')
)
"""The remainder of the most frequent bodies, which need no parser."""
_NOT_NUMBERS: Final = frozenset(("BOOL", "BYTES"))
_FP32: Final = np.dtype(np.float32)
_MANY_NUMBERS: Final = 64 * 1024
"""From this many numbers on, numpy narrows them, because it releases the GIL."""
_BLOCK_NUMBERS: Final = 256 * 1024
"""Numbers that are narrowed at a time, so that what lies between takes little memory."""
_NUMBER_BYTES: Final = 12
"""Bytes of a number as it is read, and as the model takes it."""


class FallBack(Exception):
    """The body must be read by orjson and `nested_lists` instead; this is no fault of the body."""


class Numbers:
    """A regular list of numbers, float64 or int64, with the shape that it was sent in."""

    __slots__ = ("_count", "_floats", "_memory", "_shape", "_start")

    def __init__(
        self, memory: bytearray, floats: bool, start: int, count: int, shape: tuple[int, ...]
    ) -> None:
        """Keep the `count` numbers of 8 bytes that lie in `memory` from the byte `start` on."""
        self._memory = memory
        self._floats = floats
        self._start = start
        self._count = count
        self._shape = shape

    def tensor(self, spec: TensorSpec) -> Array:
        """Return the tensor in the datatype of `spec`; raises FallBack if a number does not fit in it."""
        if spec.datatype == "FP32" and self._count < _MANY_NUMBERS:
            narrow = _json_numbers.singles(self._memory, self._start, self._count, self._floats)
            if narrow is None:
                raise FallBack
            return np.ndarray(self._shape, _FP32, narrow)
        flat = self._flat()
        if flat.dtype == spec.dtype:
            return flat.reshape(self._shape)
        tensor: Array = np.empty(self._count, spec.dtype)
        for start in range(0, self._count, _BLOCK_NUMBERS):
            block = flat[start : start + _BLOCK_NUMBERS]
            narrowed = _narrow_block(block, spec)
            if narrowed is None:
                raise FallBack
            tensor[start : start + len(block)] = narrowed
        return tensor.reshape(self._shape)

    def plain(self) -> Any:
        """Return the list as orjson would have read it; raises FallBack if that is not known."""
        if self._floats:
            raise FallBack  # it is not kept which of the numbers were written as integers
        return self._flat().reshape(self._shape).tolist()

    def _flat(self) -> Array:
        dtype = np.float64 if self._floats else np.int64
        return np.frombuffer(self._memory, dtype, self._count, self._start)


def _narrow_block(block: Array, spec: TensorSpec) -> Array | None:
    """Return float64 or int64 numbers in the datatype of `spec`; None if one of them does not fit in it."""
    if spec.datatype in FLOATS:
        return narrow_floats(block.astype(np.float64, copy=False), spec.datatype)
    if block.dtype == np.float64:
        # Beyond 2^53 not every integer has a float64 of its own.
        if not (np.abs(block) < EXACT_FLOAT).all() or (np.trunc(block) != block).any():
            return None
        block = block.astype(np.int64)
    return narrow_integers(block, spec.dtype)


def extract_numbers(body: bytes, allowance: Allowance = UNLIMITED) -> dict[str, Any] | None:
    """Read the top-level fields of `body`, with `Numbers` for the lists of numbers in `inputs`.

    In `instances` this is the value itself, in `inputs` these are the value itself, the members of an
    object, and `data` of objects in a list. All other fields hold plain values. Returns None if `body` is
    not a JSON object, or is not taken for another reason. Raises MemoryError, and for a large body what
    `check_json` raises.
    """
    if len(body) <= COUNTED_BYTES:
        found = _json_numbers.scan(body, _MARK_BYTES)
    else:
        most = _json_numbers.most_numbers(body)
        allowance.take(_NUMBER_BYTES * most, "reading the numbers of the body")
        found = _json_numbers.scan(body, _MARK_BYTES, most)
        if found is None:
            allowance.give_back(_NUMBER_BYTES * most)
    if found is None:
        return None
    remainder, memory, lists = found
    if len(remainder) > COUNTED_BYTES:
        check_json(remainder, allowance)
    numbers = [Numbers(memory, floats, start, count, shape) for floats, start, count, shape in lists]
    if remainder in _ONLY_INPUTS:
        return {"inputs": numbers[0]}
    try:
        fields = orjson.loads(remainder)
        return _MarkReplacer(numbers).fields(fields) if isinstance(fields, dict) else None
    except (FallBack, RecursionError, orjson.JSONDecodeError):
        return None


def has_null(text: bytes) -> bool:
    """Return whether `null` is anywhere in `text`."""
    return _json_numbers.has_null(text) if AVAILABLE else b"null" in text


def read_extracted(spec: TensorSpec, value: Any) -> Array:
    """Return `value`, from the fields of `extract_numbers`, as a tensor in the datatype of `spec`.

    The caller checks the shape. Raises FallBack, or an InvalidInput that may name another fault than
    `read_nested` finds first.
    """
    if not isinstance(value, Numbers):
        return read_nested(spec, value)
    if spec.datatype in _NOT_NUMBERS:
        raise FallBack
    return value.tensor(spec)


class _MarkReplacer:
    """Replaces marks by their lists: by `Numbers` where tensors are expected, else by plain lists.

    Raises FallBack if a list cannot be made plain. These are methods, not nested functions: nested
    functions that call themselves are reference cycles, which would keep the numbers of a body until the
    next collection.
    """

    def __init__(self, lists: list[Numbers]) -> None:
        self._lists = lists

    def fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the top-level fields of a body without marks."""
        return {
            key: self._inputs(value)
            if key == "inputs"
            else self._tensor(value)
            if key == "instances"
            else self._plain(value)
            for key, value in fields.items()
        }

    def _inputs(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._tensor(inner) for name, inner in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [self._v2_input(inner) for inner in value]
        return self._tensor(value)

    def _v2_input(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return self._plain(value)
        return {
            key: self._tensor(inner) if key == "data" else self._plain(inner) for key, inner in value.items()
        }

    def _tensor(self, value: Any) -> Any:
        numbers = self._marked(value)
        return self._plain(value) if numbers is None else numbers

    def _plain(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._plain(inner) for key, inner in value.items()}
        if not isinstance(value, list):
            return value
        numbers = self._marked(value)
        return [self._plain(inner) for inner in value] if numbers is None else numbers.plain()

    def _marked(self, value: Any) -> Numbers | None:
        """Return the list that `value` stands for, or None if it is not a mark."""
        if isinstance(value, list) and len(value) == 1:
            text = value[0]
            if isinstance(text, str) and text.startswith(_MARK):
                return self._lists[int(text[len(_MARK) :])]
        return None


def _powers_of_five(most: int) -> bytes:
    """Return the 128 leading bits of 5**q for q from -most to most, for D. Lemire's algorithm.

    They are rounded down, except those from -27 to -1. These are reciprocals, and with them a quotient that
    is exact, or just half-way between two floats, must come out so (section 6 of the paper).
    """
    table: list[int] = []
    for q in range(-most, most + 1):
        power = 5 ** abs(q)
        if q >= 0:
            shift = 128 - power.bit_length()
            bits = power << shift if shift >= 0 else power >> -shift
        else:
            bits = (1 << (power.bit_length() + 127)) // power + (q >= -27)
        table += (bits >> 64, bits & (2**64 - 1))
    return np.array(table, dtype=np.uint64).tobytes()


if AVAILABLE:
    _json_numbers.prepare(_powers_of_five(_json_numbers.MOST_POWER))
