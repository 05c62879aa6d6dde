"""Reads the inputs, outputs and operations of a graph from an ONNX file, where a session is not enough.

A session of ONNX Runtime reports the shape `[]` for a scalar and for a tensor of unknown rank alike, does not
name the input whose type it refuses, and does not list its operations. The file has all of them. An ONNX file
is a protobuf `ModelProto` (onnx.proto of the ONNX project). Only the messages on the way are parsed, and
weights are not read. The file is not mapped: if the page cache has large folios, one access to a mapping
adds megabytes of the file to the resident memory of the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias


class _Part(NamedTuple):
    """A message that is still in the file.

    Attributes:
        file: the descriptor of the open file.
        start: where the message starts in the file.
        end: where the message ends.
    """

    file: int
    start: int
    end: int


Message: TypeAlias = "memoryview | _Part"
Field: TypeAlias = tuple[int, "int | Message"]

_READ_BYTES: Final = 32 * 1024
"""Bytes that one read takes from the file; messages that are not longer are read at once."""
_HEADER_BYTES: Final = 20
"""The most bytes of the key and the length of a field: two varints."""

# Protobuf wire types: how the value of a field is stored.
_VARINT: Final = 0
_EIGHT_BYTES: Final = 1
_LENGTH_DELIMITED: Final = 2
_FOUR_BYTES: Final = 5

# Field numbers of onnx.proto.
_MODEL_GRAPH: Final = 7
_MODEL_FUNCTION: Final = 25
_FUNCTION_NODE: Final = 7
_GRAPH_NODE: Final = 1
_NODE_OPERATION: Final = 4
_NODE_ATTRIBUTE: Final = 5
_ATTRIBUTE_GRAPHS: Final = (6, 11)
_GRAPH_INPUT: Final = 11
_GRAPH_OUTPUT: Final = 12
_VALUE_NAME: Final = 1
_VALUE_TYPE: Final = 2
_TYPE_TENSOR: Final = 1
_TYPE_OPTIONAL: Final = 9
_OPTIONAL_ELEMENT: Final = 1
_TENSOR_ELEMENT: Final = 1
_TENSOR_SHAPE: Final = 2


class GraphValue(NamedTuple):
    """An input or output of a graph.

    Attributes:
        name: the name in the model.
        is_input: false for an output.
        element: the element type as a number of `TensorProto.DataType`; 0 if the value is no tensor.
        ranked: whether the file declares the rank.
    """

    name: str
    is_input: bool
    element: int
    ranked: bool


def graph_values(file: Path) -> list[GraphValue]:
    """The inputs (with the initialisers that may be overridden) and outputs of the graph in `file`.

    Nodes and weights are skipped. Raises OSError if the file cannot be read, and ValueError or IndexError if
    it is not valid protobuf.
    """
    with file.open("rb", buffering=0) as opened:
        return [
            _value(value, number == _GRAPH_INPUT)
            for graph in _messages(_whole(opened.fileno()), _MODEL_GRAPH)
            for number, value in _fields(graph)
            if number in (_GRAPH_INPUT, _GRAPH_OUTPUT) and not isinstance(value, int)
        ]


def graph_operations(file: Path) -> set[str]:
    """The types of the operations in `file`, also in the graphs of loops and branches and in functions.

    Raises OSError if the file cannot be read, and ValueError or IndexError if it is not valid protobuf.
    """
    found: set[str] = set()
    with file.open("rb", buffering=0) as opened:
        model = _whole(opened.fileno())
        for graph in _messages(model, _MODEL_GRAPH):
            _add_operations(graph, _GRAPH_NODE, found)
        for function in _messages(model, _MODEL_FUNCTION):
            _add_operations(function, _FUNCTION_NODE, found)
    return found


def _whole(file: int) -> _Part:
    return _Part(file, 0, os.fstat(file).st_size)


def _add_operations(graph: Message, node_field: int, found: set[str]) -> None:
    for node in _messages(graph, node_field):
        for number, field in _fields(node):
            if isinstance(field, int):
                continue
            if number == _NODE_OPERATION:
                found.add(_text(field))
            elif number == _NODE_ATTRIBUTE:
                for inner, body in _fields(field):
                    if inner in _ATTRIBUTE_GRAPHS and not isinstance(body, int):
                        _add_operations(body, _GRAPH_NODE, found)


def _value(value: Message, is_input: bool) -> GraphValue:
    name, element, ranked = "", 0, False
    for text in _messages(value, _VALUE_NAME):
        name = _text(text)
    for kind in _messages(value, _VALUE_TYPE):
        for tensor in _tensors(kind):
            for number, field in _fields(tensor):
                if number == _TENSOR_ELEMENT and isinstance(field, int):
                    element = field
                ranked = ranked or number == _TENSOR_SHAPE
    return GraphValue(name, is_input, element, ranked)


def _tensors(kind: Message) -> Iterator[Message]:
    """The tensor type in a `TypeProto`, also inside an optional type."""
    yield from _messages(kind, _TYPE_TENSOR)
    for optional in _messages(kind, _TYPE_OPTIONAL):
        for element in _messages(optional, _OPTIONAL_ELEMENT):
            yield from _messages(element, _TYPE_TENSOR)


def _text(message: Message) -> str:
    if isinstance(message, _Part):
        message = memoryview(os.pread(message.file, message.end - message.start, message.start))
    return str(message, "utf-8")


def _messages(message: Message, wanted: int) -> Iterator[Message]:
    for number, value in _fields(message):
        if number == wanted and not isinstance(value, int):
            yield value


def _fields(message: Message) -> Iterator[Field]:
    """The fields of a message: integers as int, length-delimited fields as messages."""
    if isinstance(message, _Part):
        yield from _fields_in_file(message)
        return
    offset, end = 0, len(message)
    while offset < end:
        number, kind, length, offset = _header(message, offset)
        if kind == _LENGTH_DELIMITED:
            yield number, message[offset : offset + length]
            offset += length
        elif kind == _VARINT:
            yield number, length
        else:
            offset += length


def _fields_in_file(part: _Part) -> Iterator[Field]:
    """The fields of a message in a file. Those that are longer than a read stay in the file."""
    file, start, end = part
    view, offset = memoryview(b""), 0
    while start + offset < end:
        if offset + _HEADER_BYTES > len(view) and start + len(view) < end:
            start += offset
            view, offset = memoryview(os.pread(file, min(_READ_BYTES, end - start), start)), 0
        number, kind, length, offset = _header(view, offset)
        if kind == _LENGTH_DELIMITED:
            if length <= _READ_BYTES:
                if offset + length > len(view) and start + len(view) < end:
                    start += offset
                    view, offset = memoryview(os.pread(file, min(_READ_BYTES, end - start), start)), 0
                yield number, view[offset : offset + length]
            else:
                yield number, _Part(file, start + offset, min(end, start + offset + length))
            offset += length
        elif kind == _VARINT:
            yield number, length
        else:
            offset += length


def _header(message: memoryview, offset: int) -> tuple[int, int, int, int]:
    """The number and the wire type of the field at `offset`, a size, and the offset after the header.

    The size is the length of the value after the header, or the value of a varint.
    """
    key, offset = _varint(message, offset)
    kind = key & 7
    if kind in (_LENGTH_DELIMITED, _VARINT):
        length, offset = _varint(message, offset)
    elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
        length = 8 if kind == _EIGHT_BYTES else 4
    else:
        raise ValueError(f"a protobuf field has wire type {kind}, which ONNX does not use")
    return key >> 3, kind, length, offset


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    """The varint at `offset` (seven bits in each byte, least significant first), and the offset after it."""
    number = shift = 0
    while True:
        byte = message[offset]
        offset += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, offset
        shift += 7
