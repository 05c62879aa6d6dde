"""Reads the inputs, outputs and operations of a graph from an ONNX file, where a session is not enough.

A session of ONNX Runtime reports the shape `[]` for a scalar and for a tensor of unknown rank alike, does not
name the input whose type it refuses, and does not list its operations. The file has all of them. An ONNX file
is a protobuf `ModelProto` (onnx.proto of the ONNX project). Only the messages on the way are parsed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

Field: TypeAlias = tuple[int, "int | memoryview"]

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
    return [
        _value(value, number == _GRAPH_INPUT)
        for graph in _messages(_mapped(file), _MODEL_GRAPH)
        for number, value in _fields(graph)
        if number in (_GRAPH_INPUT, _GRAPH_OUTPUT) and isinstance(value, memoryview)
    ]


def graph_operations(file: Path) -> set[str]:
    """The types of the operations in `file`, also in the graphs of loops and branches and in functions.

    Raises OSError if the file cannot be read, and ValueError or IndexError if it is not valid protobuf.
    """
    model = _mapped(file)
    found: set[str] = set()
    for graph in _messages(model, _MODEL_GRAPH):
        _add_operations(graph, _GRAPH_NODE, found)
    for function in _messages(model, _MODEL_FUNCTION):
        _add_operations(function, _FUNCTION_NODE, found)
    return found


def _mapped(file: Path) -> memoryview:
    with file.open("rb") as opened:
        # The file is unmapped with its last view.
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))


def _add_operations(graph: memoryview, node_field: int, found: set[str]) -> None:
    for node in _messages(graph, node_field):
        for number, field in _fields(node):
            if isinstance(field, int):
                continue
            if number == _NODE_OPERATION:
                found.add(str(field, "utf-8"))
            elif number == _NODE_ATTRIBUTE:
                for inner, body in _fields(field):
                    if inner in _ATTRIBUTE_GRAPHS and isinstance(body, memoryview):
                        _add_operations(body, _GRAPH_NODE, found)


def _value(value: memoryview, is_input: bool) -> GraphValue:
    name, element, ranked = "", 0, False
    for text in _messages(value, _VALUE_NAME):
        name = str(text, "utf-8")
    for kind in _messages(value, _VALUE_TYPE):
        for tensor in _tensors(kind):
            for number, field in _fields(tensor):
                if number == _TENSOR_ELEMENT and isinstance(field, int):
                    element = field
                ranked = ranked or number == _TENSOR_SHAPE
    return GraphValue(name, is_input, element, ranked)


def _tensors(kind: memoryview) -> Iterator[memoryview]:
    """The tensor type in a `TypeProto`, also inside an optional type."""
    yield from _messages(kind, _TYPE_TENSOR)
    for optional in _messages(kind, _TYPE_OPTIONAL):
        for element in _messages(optional, _OPTIONAL_ELEMENT):
            yield from _messages(element, _TYPE_TENSOR)


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, value in _fields(message):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message: integers as int, length-delimited fields as a view."""
    offset, end = 0, len(message)
    while offset < end:
        key, offset = _varint(message, offset)
        kind = key & 7
        if kind == _LENGTH_DELIMITED:
            length, offset = _varint(message, offset)
            yield key >> 3, message[offset : offset + length]
            offset += length
        elif kind == _VARINT:
            number, offset = _varint(message, offset)
            yield key >> 3, number
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            offset += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a protobuf field has wire type {kind}, which ONNX does not use")


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
