"""Tensors as bytes in shared memory, by their layout.

The bytes of tensors follow one another, each from a multiple of `ALIGNMENT` bytes. Text and values that are
no tensors have no fixed size: 8 bytes with the size come before them. Nothing is pickled.
"""

from __future__ import annotations

import json
from struct import Struct, pack, unpack_from
from typing import Any, Final

import numpy as np

from inferpool.engine.arena import ALIGNMENT
from inferpool.engine.records import ProtocolError, read_json
from inferpool.engine.tensor_layouts import ARRAYS, CODES, TEXT, Layout, whole_size
from inferpool.tensors import Tensors, element_count

_COPIED_BYTES: Final = 16 * 1024
"""Smaller tensors are written as one piece of bytes, which costs less than an array of the memory."""
_SIZE: Final = Struct("<Q")

Buffer = Any
"""Memory that tensors are read from: an mmap or a bytearray."""


def encode(layout: Layout, tensors: Tensors) -> bytes:
    """Return the tensors as bytes. Raises TypeError for text that is no `str`, or a value without a form."""
    if layout.single is not None:
        return _array_bytes(tensors[layout.single.name], layout.single.dtype)
    pieces: list[bytes] = []
    for form, tensor in zip(layout.forms, tensors.values(), strict=True):
        if form.nbytes >= 0:
            piece = _array_bytes(tensor, form.dtype)
        else:
            piece = _text_bytes(tensor) if form.code == TEXT else _value_bytes(tensor)
            piece = _SIZE.pack(len(piece)) + piece
        pieces.append(piece)
        unused = -len(piece) % ALIGNMENT
        if unused:
            pieces.append(bytes(unused))
    return b"".join(pieces)


def write(memory: Buffer, at: int, layout: Layout, tensors: Tensors, rows: int) -> None:
    """Write tensors of a `plain` layout into `memory`, an mmap with room for `layout.size(rows)` bytes."""
    single = layout.single
    if single is not None and single.nbytes * rows <= _COPIED_BYTES:
        memory[at : at + single.nbytes * rows] = tensors[single.name].tobytes()
        return
    for form, tensor in zip(layout.forms, tensors.values(), strict=True):
        nbytes = form.nbytes * rows if form.by_rows else form.nbytes
        if nbytes <= _COPIED_BYTES:
            memory[at : at + nbytes] = _array_bytes(tensor, form.dtype)
        else:
            np.ndarray(tensor.shape, form.dtype, memory, at)[...] = tensor
        at = (at + nbytes + (ALIGNMENT - 1)) & -ALIGNMENT


def read(memory: Buffer, at: int, end: int, layout: Layout, rows: int) -> Tensors:
    """Return the tensors whose bytes `memory` has between `at` and `end`.

    Arrays of numbers are views of the memory; text and other values are copied. Raises ProtocolError if a
    tensor does not end before `end`, or if text or a value cannot be read.
    """
    single = layout.single
    if single is not None:
        if at + single.nbytes * rows > end:
            raise ProtocolError(f'tensor "{single.name:.100}" of {rows} rows is longer than its memory')
        return {single.name: np.ndarray((rows, *single.shape), single.dtype, memory, at)}
    tensors: Tensors = {}
    for form in layout.forms:
        if form.nbytes >= 0:
            nbytes = form.nbytes * rows if form.by_rows else form.nbytes
            if at + nbytes > end:
                raise ProtocolError(f'tensor "{form.name:.100}" of {nbytes} bytes is longer than its memory')
            shape = (rows, *form.shape) if form.by_rows else form.shape
            tensors[form.name] = np.ndarray(shape, form.dtype, memory, at)
        else:
            if at + 8 > end:
                raise ProtocolError(f'tensor "{form.name:.100}" has no memory')
            nbytes = 8 + int.from_bytes(memory[at : at + 8], "little")
            if at + nbytes > end:
                raise ProtocolError(f'tensor "{form.name:.100}" of {nbytes} bytes is longer than its memory')
            piece = bytearray(memory[at + 8 : at + nbytes])
            if form.code == TEXT:
                tensors[form.name] = _read_text(piece, (rows, *form.shape) if form.by_rows else form.shape)
            else:
                tensors[form.name] = _read_value_bytes(piece)
        at = (at + nbytes + (ALIGNMENT - 1)) & -ALIGNMENT
    return tensors


def _array_bytes(tensor: Any, dtype: Any) -> bytes:
    found: bytes = tensor.tobytes() if tensor.dtype == dtype else tensor.astype(dtype).tobytes()
    return found


def _text_bytes(tensor: Any) -> bytes:
    texts = tensor.ravel().tolist()
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"text expected, {type(text).__name__} came")
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return pack(f"<{len(encoded)}I", *map(len, encoded)) + b"".join(encoded)


def _read_text(piece: bytearray, shape: tuple[int, ...]) -> Any:
    count = element_count(shape)
    at = 4 * count
    if at > len(piece):
        raise ProtocolError(f"{count} texts came in {len(piece)} bytes")
    lengths = unpack_from(f"<{count}I", piece)
    if at + sum(lengths) != len(piece):
        raise ProtocolError(f"texts of {sum(lengths)} bytes came in {len(piece) - at} bytes")
    texts: list[str] = []
    try:
        for length in lengths:
            texts.append(piece[at : at + length].decode("utf-8", "surrogatepass"))
            at += length
    except UnicodeDecodeError as error:
        raise ProtocolError(f"text expected: {error}") from None
    found = np.empty(count, np.object_)
    found[:] = texts
    return found.reshape(shape)


def _value_bytes(value: object) -> bytes:
    arrays: list[bytes] = []
    text = json.dumps(_tree_of(value, arrays), separators=(",", ":")).encode()
    pieces = [_SIZE.pack(len(text)), text, bytes(-(8 + len(text)) % 8)]
    for array in arrays:
        pieces += [array, bytes(-len(array) % 8)]
    return b"".join(pieces)


def _tree_of(value: Any, arrays: list[bytes]) -> object:
    """Return a value in the form of JSON. Lists begin with a letter that tells what they stand for."""
    # Not by `isinstance`, because some numbers of numpy are floats, too.
    if type(value) in (bool, int, float, str, type(None)):
        return value
    if isinstance(value, (list, tuple)):
        return ["t" if isinstance(value, tuple) else "l", *[_tree_of(each, arrays) for each in value]]
    if isinstance(value, dict):
        return [
            "m",
            *[[_tree_of(key, arrays), _tree_of(each, arrays)] for key, each in value.items()],
        ]
    if isinstance(value, (np.ndarray, np.generic)):
        array: Any = np.asarray(value)
        code = CODES.get(array.dtype) or CODES.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise TypeError(f"an output has an array of the datatype {array.dtype}")
        arrays.append(_text_bytes(array) if code == TEXT else _array_bytes(array, ARRAYS[code]))
        scalar = isinstance(value, np.generic)
        return ["s" if scalar else "a", code, list(array.shape), len(arrays[-1])]
    raise TypeError(f"an output has a value of the type {type(value).__name__}")


def _read_value_bytes(piece: bytearray) -> Any:
    if len(piece) < 8:
        raise ProtocolError("a value without bytes came")
    length = int.from_bytes(piece[:8], "little")
    if 8 + length > len(piece):
        raise ProtocolError(f"a value of {length} bytes came in {len(piece)} bytes")
    reader = _ValueReader(piece, (8 + length + 7) & -8)
    try:
        return reader.read(read_json(bytes(piece[8 : 8 + length])))
    except (IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a value came that cannot be read: {error}") from None


class _ValueReader:
    """Reads a value that is no array, whose arrays follow one another in `piece`."""

    __slots__ = ("_at", "_piece")

    def __init__(self, piece: bytearray, at: int) -> None:
        self._piece = piece
        self._at = at

    def read(self, tree: Any) -> Any:
        """Return the value of a tree of JSON; raises IndexError, TypeError, ValueError or ProtocolError."""
        if not isinstance(tree, list):
            if isinstance(tree, dict):
                raise TypeError("a mapping")
            return tree
        kind = tree[0]
        if kind == "l":
            return [self.read(each) for each in tree[1:]]
        if kind == "t":
            return tuple([self.read(each) for each in tree[1:]])
        if kind == "m":
            return {self.read(key): self.read(each) for key, each in tree[1:]}
        if kind not in ("a", "s"):
            raise ValueError("no such form")
        code, shape, nbytes = tree[1], tuple(whole_size(size) for size in tree[2]), whole_size(tree[3])
        if self._at + nbytes > len(self._piece):
            raise ValueError("an array without bytes")
        piece = self._piece[self._at : self._at + nbytes]
        self._at = (self._at + nbytes + 7) & -8
        if code == TEXT:
            found = _read_text(piece, shape)
        else:
            dtype = ARRAYS[code]
            if element_count(shape) * dtype.itemsize != nbytes:
                raise ValueError("an array of another size")
            found = np.ndarray(shape, dtype, piece)
        return found[()] if kind == "s" else found
