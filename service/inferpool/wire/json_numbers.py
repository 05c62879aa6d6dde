"""Lists of numbers straight from a JSON body to a tensor; without the interpreter's lock where it is long.

`_numbers`, a module in C, takes them out of the body; orjson reads what is left, and so judges all that is no
list of numbers. Other threads run meanwhile: a body of megabytes holds up nobody else's request.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

import numpy as np
import orjson

from inferpool.tensors import Array, TensorSpec
from inferpool.wire.json_document import FallBack
from inferpool.wire.nested_lists import FLOATS, narrow_floats, narrow_integers, read_nested

try:
    from inferpool.wire import _json_numbers
except ImportError:  # there was no compiler where the package was built
    _json_numbers = None  # type: ignore[assignment]

AVAILABLE: bool = _json_numbers is not None
"""Whether the module in C is there, and to be used: tests and benchmarks choose the way by it."""

_MARK: Final = secrets.token_hex(8)
"""What stands for a list: nobody who sends a body can know it."""
_MARK_BYTES: Final = _MARK.encode()
_BARE: Final = frozenset(text % _MARK_BYTES for text in (b'{"inputs":["%s0"]}', b'{"inputs": ["%s0"]}'))
"""What is left of the commonest bodies: there is nothing to be read in it."""
_MOST_REST: Final = 2**20
"""Where more than this is left, numbers are not what the body is about, and to put them back takes long."""
_NOT_NUMBERS: Final = frozenset(("BF16", "BOOL", "BYTES"))
_SINGLE: Final = np.dtype(np.float32)
_MANY: Final = 64 * 1024
"""So many numbers are narrowed by numpy, which lets other threads run."""


class Numbers:
    """A regular list of numbers, float64 or int64, and the shape that they were sent in."""

    __slots__ = ("_count", "_floats", "_memory", "_shape", "_start")

    def __init__(self, memory: bytearray, real: bool, start: int, count: int, shape: tuple[int, ...]) -> None:
        """`count` of them lie in `memory` from the byte `start` on, `real` ones or integers."""
        self._memory = memory
        self._floats = real
        self._start = start
        self._count = count
        self._shape = shape

    def tensor(self, spec: TensorSpec) -> Array:
        """The tensor in the datatype of `spec`; raises Declined where a number does not fit it."""
        tensor: Array | None = None
        if spec.datatype == "FP32" and self._count < _MANY:
            narrow = _json_numbers.singles(self._memory, self._start, self._count, self._floats)
            if narrow is None:
                raise FallBack
            return np.ndarray(self._shape, _SINGLE, narrow)
        if spec.datatype in FLOATS:
            tensor = narrow_floats(self._flat().astype(np.float64, copy=False), spec.dtype)
        elif not self._floats:
            tensor = narrow_integers(self._flat(), spec.dtype)
        if tensor is None:
            raise FallBack
        return tensor.reshape(self._shape)

    def plain(self) -> Any:
        """The list as orjson would have read it; raises Declined where that is no longer known."""
        if self._floats:
            raise FallBack  # which of them were written as integers has not been kept
        return self._flat().reshape(self._shape).tolist()

    def _flat(self) -> Array:
        dtype = np.float64 if self._floats else np.int64
        return np.frombuffer(self._memory, dtype, self._count, self._start)


class NumbersDocument:
    """A body whose lists of numbers have been taken out; see `inferpool.wire.json_document`."""

    __slots__ = ("fields",)

    def __init__(self, fields: dict[str, Any]) -> None:
        """`fields` has `Numbers` where they may stay for `read`."""
        self.fields = fields

    def read(self, spec: TensorSpec, value: Any) -> Array:
        """The tensor that `value` spells, in the datatype of `spec`; raises Declined or InvalidInput."""
        if not isinstance(value, Numbers):
            return read_nested(spec, value)
        if spec.datatype in _NOT_NUMBERS:
            raise FallBack
        return value.tensor(spec)

    def proven(self) -> bool:
        """They are: no others are taken out."""
        return True

    def close(self) -> None:
        """Let go of the numbers."""
        self.fields = {}


class _Filling:
    """Puts lists of numbers in place of their marks: plain ones, but for those that `read` is to get.

    Raises Declined where one cannot be made plain again. No functions within a function: those that call
    themselves are circles, which keep what they know, a body's numbers, until the collector comes.
    """

    def __init__(self, lists: list[Numbers]) -> None:
        self._lists = lists

    def fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The top-level fields of a body."""
        return {
            key: self._inputs(value) if key == "inputs" else self._plain(value)
            for key, value in fields.items()
        }

    def _inputs(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._left(inner) for name, inner in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [self._entry(inner) for inner in value]
        return self._left(value)

    def _entry(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return self._plain(value)
        return {
            key: self._left(inner) if key == "data" else self._plain(inner) for key, inner in value.items()
        }

    def _left(self, value: Any) -> Any:
        found = self._found(value)
        return self._plain(value) if found is None else found

    def _plain(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._plain(inner) for key, inner in value.items()}
        if not isinstance(value, list):
            return value
        found = self._found(value)
        return [self._plain(inner) for inner in value] if found is None else found.plain()

    def _found(self, value: Any) -> Numbers | None:
        """The list that `value` marks, if it is a mark."""
        if isinstance(value, list) and len(value) == 1:
            only = value[0]
            if isinstance(only, str) and only.startswith(_MARK):
                return self._lists[int(only[len(_MARK) :])]
        return None


def open_document(body: bytes) -> NumbersDocument | None:
    """Take the numbers out of `body`; None where it is no JSON object, or has what this way does not take.

    Raises MemoryError.
    """
    found = _json_numbers.scan(body, _MARK_BYTES)
    if found is None:
        return None
    rest, memory, lists = found
    if len(rest) > _MOST_REST:
        return None
    numbers = [Numbers(memory, *known) for known in lists]
    if rest in _BARE:
        return NumbersDocument({"inputs": numbers[0]})
    try:
        fields = orjson.loads(rest)
        return NumbersDocument(_Filling(numbers).fields(fields)) if isinstance(fields, dict) else None
    except (FallBack, RecursionError, orjson.JSONDecodeError):
        return None


def _powers_of_five(most: int) -> bytes:
    """The 128 leading bits of 5**q for q from -most to most, as D. Lemire's algorithm wants them.

    They are rounded down but for those from -27 to -1: these are the reciprocals by which a quotient that is
    exact, or just half-way, must come out so (section 6 of the paper).
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
