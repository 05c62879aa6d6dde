"""The fast way through a large JSON body: numbers to a typed buffer with no Python object for each.

Everything here may decline, and whatever it does not decline is what
`service.wire.arrays` makes of the same body. So it words no errors of its own: the caller reads a
declined body the plain way, which finds the fault and words it.

pysimdjson flattens nested arrays without a look at their lengths, so the shape is proven in two steps: every
list that the shape counts exists with the length it must have, and the body opens no list more than those.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

import numpy as np

from service.tensors import Array, TensorSpec
from service.wire.arrays import FLOATS, MAX_RANK, narrow_floats, narrow_integers, product, read_nested

try:
    import simdjson
except ImportError:  # it has no wheels for some platforms; the plain way needs none
    simdjson = None  # type: ignore[assignment]

AVAILABLE: Final = simdjson is not None
"""Whether pysimdjson is installed."""

_BOM: Final = b"\xef\xbb\xbf"
_SATURATED: Final = 0xFFFFFF
"""simdjson counts the elements of a list no further than this (24 bits on its tape)."""
_KEPT_BODY_BYTES: Final = 16 * 2**20
"""A parser keeps memory of some ten times its largest body; one that grew beyond this body is let go."""
_BUFFER_TYPES: Final[dict[str, Any]] = {"d": "d", "q": "i", "Q": "u"}
"""numpy's letter for a 64-bit type to pysimdjson's."""
_NOT_BUFFERED: Final = frozenset(("BF16", "BOOL", "BYTES"))


class _Spare(threading.local):
    """The parser that this thread does not use at the moment."""

    parser: Any = None


_spare = _Spare()


class Declined(Exception):
    """This way does not take what it found."""


class Document:
    """A parsed body.

    Attributes:
        fields: the top-level fields as plain values, except for what may hold many numbers, which stays in
            the parser for `read`: `inputs`, or its members where it is an object, or their `data` where it
            is a list of objects.
    """

    __slots__ = ("_body", "_lists", "_parser", "fields")

    def __init__(self, body: bytes, parser: Any, root: Any) -> None:
        """Take over `parser`, and `root`, the object it parsed."""
        self._body = body
        self._parser = parser
        self._lists = 0
        self.fields: dict[str, Any] = {}
        for key in _distinct_keys(root):
            self.fields[key] = self._inputs(root[key]) if key == "inputs" else self._plain(root[key])

    def read(self, spec: TensorSpec, value: Any) -> Array:
        """The tensor that `value`, left in the parser or plain, spells, in the datatype of `spec`.

        Raises Declined, or InvalidInput which may name another fault than the plain way finds first.
        """
        tensor = _read(spec, value)
        self._lists += sum(product(tensor.shape[:depth]) for depth in range(tensor.ndim))
        return tensor

    def proven(self) -> bool:
        """Whether every tensor read is regular; ask once all of them are read."""
        return self._body.count(b"[") == self._lists

    def close(self) -> None:
        """Give the parser back; nothing is read afterwards."""
        self.fields = {}
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
        if isinstance(value, simdjson.Array):
            value = value.as_list()
        elif isinstance(value, simdjson.Object):
            value = value.as_dict()
        self._lists += _lists_within(value)
        return value


def open_document(body: bytes) -> Document | None:
    """Parse `body`, or decline: it is no JSON object, or one with something this way does not take."""
    if body.startswith(_BOM):
        return None
    parser, _spare.parser = _spare.parser, None
    if parser is None:
        parser = simdjson.Parser()
    try:
        root = parser.parse(body)
        return Document(body, parser, root) if isinstance(root, simdjson.Object) else None
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


def _lists_within(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_lists_within, value.values()))
    return 1 + sum(map(_lists_within, value)) if isinstance(value, list) else 0


def _read(spec: TensorSpec, value: Any) -> Array:
    if isinstance(value, simdjson.Object):
        raise Declined
    if not isinstance(value, simdjson.Array):
        return read_nested(spec, value)
    if spec.datatype in _NOT_BUFFERED:
        return read_nested(spec, value.as_list())
    shape = _shape_along_first(value)
    floats = spec.datatype in FLOATS
    code = "d" if floats else "Q" if spec.datatype == "UINT64" else "q"
    try:
        flat = np.frombuffer(value.as_buffer(of_type=_BUFFER_TYPES[code]), dtype=code)
        if flat.size != product(shape) or not _lengths_agree(value, shape):
            raise Declined
    except (TypeError, ValueError):  # something else than a number, or not of this type
        raise Declined from None
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
    for size in shape[1:]:
        level = list(chain.from_iterable(level))
        if set(map(len, level)) != {size}:
            return False
    return True
