"""The fast way through a large JSON body: numbers to a typed buffer with no Python object for each.

Everything here may decline, and whatever it does not decline is what
`service.wire.arrays` makes of the same body. So it words no errors of its own: the caller reads a
declined body the plain way, which finds the fault and words it.

pysimdjson flattens nested arrays without a look at their lengths. The shape is taken from the first list, its
first list and so on, and the number of elements must fit it. Two things together prove the rest: the body
opens no list more than the shapes count, and the lists that they count are there, each of its length. The
latter is asked of the parser where the lists are few, and read off the body's brackets and commas where they
are many. The brackets do not lie: a string of theirs that is no tensor's is one that the count has too many.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

import numpy as np

from service.tensors import Array, TensorSpec
from service.wire.arrays import FLOATS, MAX_RANK, narrow_floats, narrow_integers, product, read_nested
from service.wire.document import Declined

try:
    import simdjson
except ImportError:  # it has no wheels for some platforms; the plain way needs none
    simdjson = None  # type: ignore[assignment]

AVAILABLE: Final = simdjson is not None
"""Whether pysimdjson is installed."""

_BOM: Final = b"\xef\xbb\xbf"
_SATURATED: Final = 0xFFFFFF
"""simdjson counts the elements of a list no further than this (24 bits on its tape)."""
_KEPT_BODY_BYTES: Final = 4 * 2**20
"""A parser keeps memory of some ten times its largest body; one that grew beyond this body is let go."""
_IN_NUMBERS: Final = b"0123456789.eE+- \t\r\n"
"""What JSON writes numbers with, and its white space."""
_BYTES_PER_LIST: Final = 170
"""Asking the parser for a list takes as long as deleting the numbers from so much of the body."""
_BUFFER_TYPES: Final[dict[str, Any]] = {"d": "d", "q": "i", "Q": "u"}
"""numpy's letter for a 64-bit type to pysimdjson's."""
_NOT_BUFFERED: Final = frozenset(("BF16", "BOOL", "BYTES"))


class _Spare(threading.local):
    """The parser that this thread does not use at the moment."""

    parser: Any = None


_spare = _Spare()


class SimdDocument:
    """A parsed body; what is left for `read` stays in the parser. See `service.wire.document`."""

    __slots__ = ("_bare", "_body", "_lists", "_nested", "_parser", "fields")

    def __init__(self, body: bytes, parser: Any, root: Any) -> None:
        """Take over `parser`, and `root`, the object it parsed."""
        self._body = body
        self._parser = parser
        self._lists = 0
        self._bare = True
        self._nested: list[tuple[Any, tuple[int, ...]]] = []
        self.fields: dict[str, Any] = {}
        for key in _distinct_keys(root):
            self.fields[key] = self._inputs(root[key]) if key == "inputs" else self._plain(root[key])

    def read(self, spec: TensorSpec, value: Any) -> Array:
        """The tensor that `value`, left in the parser or plain, spells, in the datatype of `spec`.

        Read the tensors in the body's order. Raises Declined, or InvalidInput which may name another fault
        than the plain way finds first.
        """
        if isinstance(value, simdjson.Array) and spec.datatype not in _NOT_BUFFERED:
            tensor = _read_numbers(spec, value)
            if tensor.ndim > 1:
                self._nested.append((value, tensor.shape))
        else:
            tensor = read_nested(spec, _to_python(value))
            self._bare = self._bare and tensor.ndim < 2
        self._lists += _lists_in(tensor.shape)
        return tensor

    def proven(self) -> bool:
        """Whether every tensor read is regular; ask once all of them are read."""
        if self._body.count(b"[") != self._lists:
            return False
        lists = sum(_lists_in(shape) for _, shape in self._nested)
        if self._bare and lists * _BYTES_PER_LIST > len(self._body):
            return _brackets_agree(self._body, [shape for _, shape in self._nested])
        return all(_lengths_agree(array, shape) for array, shape in self._nested)

    def close(self) -> None:
        """Give the parser back; nothing is read afterwards."""
        self.fields = {}
        self._nested = []
        _give_back(self._parser, self._body)

    def _inputs(self, value: Any) -> Any:
        if isinstance(value, simdjson.Object):
            return {name: value[name] for name in _distinct_keys(value)}
        if isinstance(value, simdjson.Array) and len(value) and isinstance(value[0], simdjson.Object):
            self._lists += 1
            return list(map(self._entry, value))
        return value

    def _entry(self, value: Any) -> Any:
        if not isinstance(value, simdjson.Object):
            raise Declined
        keys = _distinct_keys(value)
        return {key: value[key] if key == "data" else self._plain(value[key]) for key in keys}

    def _plain(self, value: Any) -> Any:
        value = _to_python(value)
        if isinstance(value, (list, dict)):
            lists, depth = _lists_within(value)
            self._lists += lists
            self._bare = self._bare and depth < 2
        return value


def open_document(body: bytes) -> SimdDocument | None:
    """Parse `body`, or decline: it is no JSON object, or one with something this way does not take."""
    if body.startswith(_BOM):
        return None
    parser, _spare.parser = _spare.parser, None
    if parser is None:
        parser = simdjson.Parser()
    try:
        root = parser.parse(body)
        return SimdDocument(body, parser, root) if isinstance(root, simdjson.Object) else None
    except (Declined, RuntimeError, ValueError):  # or too deep, or an integer beyond 64 bits
        return None


def _give_back(parser: Any, body: bytes) -> None:
    if len(body) <= _KEPT_BODY_BYTES:
        _spare.parser = parser


def _distinct_keys(proxy: Any) -> list[str]:
    """The keys of an object, each of which finds its own value."""
    keys = list(proxy)
    # A look-up finds the first of two equal keys, where the last one counts, and ends the key at a NUL.
    if len(set(keys)) < len(keys) or any("\0" in key for key in keys):
        raise Declined
    return keys


def _to_python(value: Any) -> Any:
    if isinstance(value, simdjson.Array):
        return value.as_list()
    return value.as_dict() if isinstance(value, simdjson.Object) else value


def _lists_within(value: Any) -> tuple[int, int]:
    """How many lists a plain value holds, itself included, and how deep they are in one another."""
    if not isinstance(value, (list, dict)):
        return 0, 0
    inner = list(map(_lists_within, value.values() if isinstance(value, dict) else value))
    own = int(isinstance(value, list))
    return own + sum(lists for lists, _ in inner), own + max((depth for _, depth in inner), default=0)


def _lists_in(shape: tuple[int, ...]) -> int:
    """How many lists a tensor of this shape is written with."""
    return sum(product(shape[:depth]) for depth in range(len(shape)))


def _read_numbers(spec: TensorSpec, array: Any) -> Array:
    shape = _shape_along_first(array)
    floats = spec.datatype in FLOATS
    code = "d" if floats else "Q" if spec.datatype == "UINT64" else "q"
    try:
        flat = np.frombuffer(array.as_buffer(of_type=_BUFFER_TYPES[code]), dtype=code)
    except (TypeError, ValueError):  # something else than a number, or not of this type
        raise Declined from None
    if flat.size != product(shape):
        raise Declined
    tensor = narrow_floats(flat, spec.dtype) if floats else narrow_integers(flat, spec.dtype)
    if tensor is None:
        raise Declined
    return tensor.reshape(shape)


def _shape_along_first(value: Any) -> tuple[int, ...]:
    """The lengths of the first list, of its first list, and so on."""
    shape: list[int] = []
    while isinstance(value, simdjson.Array):
        size = len(value)
        if not 0 < size < _SATURATED or len(shape) == MAX_RANK:
            raise Declined
        shape.append(size)
        value = value[0]
    return tuple(shape)


def _lengths_agree(array: Any, shape: tuple[int, ...]) -> bool:
    """Whether the lists at each depth have just the length that `shape` gives them."""
    level: Iterable[Any] = (array,)
    for depth, size in enumerate(shape[1:], 2):
        inner = chain.from_iterable(level)
        # The lists at the bottom are the many: they pass by one at a time and are not kept.
        level = inner if depth == len(shape) else list(inner)
        try:
            if set(map(len, level)) != {size}:
                return False
        except TypeError:  # a number among the lists
            return False
    return True


def _brackets_agree(body: bytes, shapes: list[tuple[int, ...]]) -> bool:
    """Whether the body has, in this order, the brackets and commas of tensors of these `shapes`.

    Every shape has two dimensions or more, and where the body nests lists outside of strings it is in
    these tensors. What tells a list of none from one of one, the number of elements, has been checked.
    """
    skeleton = body.translate(None, _IN_NUMBERS)
    place = 0
    for shape in shapes:
        expected = b"," * (shape[-1] - 1)
        for size in reversed(shape[:-1]):
            inner = b"[" + expected + b"]"
            expected = (inner + b",") * (size - 1) + inner
        expected = b"[" + expected + b"]"
        place = skeleton.find(b"[[", place)
        if place < 0 or not skeleton.startswith(expected, place):
            return False
        place += len(expected)
    return True
