"""Reads a model's graph without its weights, which are most of a file and do not matter to the analysis.

A protobuf message is a sequence of fields: a key (the field's number and how it is encoded), for most fields
a length, and the content. So the numbers of large weights are skipped, and never come into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from onnx import ModelProto

_Reader: TypeAlias = Callable[[BinaryIO, int], bytes]
_GRAPH: Final = 7
"""The number of the graph's field in ModelProto."""
_INITIALIZER: Final = 5
"""The number of the field of a constant in GraphProto."""
_CONTENT: Final = frozenset((4, 5, 7, 9, 10, 11))
"""The numbers of the fields of TensorProto that hold numbers."""
_LARGE: Final = 1 << 17
"""Bytes from which a constant's numbers are left out; the analysis computes with smaller ones."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_graph(file: Path) -> ModelProto:
    """Return the model in `file` without the numbers of its large constants; their shapes stay.

    Raises ValueError, OSError or DecodeError for a file that is no model.
    """
    size = file.stat().st_size
    with file.open("rb") as source:
        model = ModelProto()
        model.ParseFromString(_message(source, size, _GRAPH, _graph))
        return model


def _graph(source: BinaryIO, end: int) -> bytes:
    return _message(source, end, _INITIALIZER, _initializer)


def _initializer(source: BinaryIO, end: int) -> bytes:
    length = end - source.tell()
    return source.read(length) if length < _LARGE else _message(source, end, None, None)


def _message(source: BinaryIO, end: int, inner: int | None, read_inner: _Reader | None) -> bytes:
    """Return a message that ends at `end`, with its fields `inner` as `read_inner` reads them.

    Without `inner` it is a tensor, and its numbers are left out.
    """
    parts: list[bytes] = []
    while source.tell() < end:
        key, encoded = _varint(source)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            content = _varint(source)[1]
        elif kind in (_FIXED64, _FIXED32):
            content = source.read(8 if kind == _FIXED64 else 4)
        elif kind == _BYTES:
            length, prefix = _varint(source)
            stop = source.tell() + length
            if stop > end:
                raise ValueError("the file is no complete model")
            if number == inner and read_inner is not None:
                content = read_inner(source, stop)
                content = _encoded(len(content)) + content
            elif inner is None and number in _CONTENT:
                source.seek(stop)
                continue
            else:
                content = prefix + source.read(length)
        else:
            raise ValueError("the file is no model")
        parts += (encoded, content)
    return b"".join(parts)


def _varint(source: BinaryIO) -> tuple[int, bytes]:
    """Return the next number, and its bytes."""
    value, encoded = 0, bytearray()
    while True:
        byte = source.read(1)
        if not byte or len(encoded) > 9:
            raise ValueError("the file is no complete model")
        value |= (byte[0] & 0x7F) << (7 * len(encoded))
        encoded += byte
        if byte[0] < 0x80:
            return value, bytes(encoded)


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
