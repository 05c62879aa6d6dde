"""What an ONNX file says of its graph's inputs and outputs that a session of ONNX Runtime does not tell.

A session gives the shape `[]` for a scalar and for a tensor of unknown rank alike, and does not name the
input whose type keeps it from loading. Both stand in the file: a protobuf `ModelProto` (onnx.proto of the
ONNX project), of which only the few messages on the way are read here, and nothing else is looked at.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

Field: TypeAlias = tuple[int, "int | memoryview"]

# Wire types of protobuf: how a field's value is stored.
_VARINT: Final = 0
_EIGHT_BYTES: Final = 1
_LENGTH_DELIMITED: Final = 2
_FOUR_BYTES: Final = 5

# Field numbers of onnx.proto.
_MODEL_GRAPH: Final = 7
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
        name: as the model spells it.
        is_input: false for an output.
        element: the number of its elements' type in `TensorProto.DataType`; 0 where it is no tensor.
        ranked: whether its rank is said.
    """

    name: str
    is_input: bool
    element: int
    ranked: bool


def graph_values(file: Path) -> list[GraphValue]:
    """The inputs (initialisers among them where they may be set) and outputs of a model's graph.

    The file is one that ONNX Runtime has parsed. Nodes and weights are skipped over, not read. Raises
    OSError where the file cannot be read, ValueError or IndexError where it is no sound protobuf.
    """
    with file.open("rb") as opened:
        # Unmapped with its last view: those of the generators below end with this function.
        model = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    return [
        _value(value, number == _GRAPH_INPUT)
        for graph in _messages(model, _MODEL_GRAPH)
        for number, value in _fields(graph)
        if number in (_GRAPH_INPUT, _GRAPH_OUTPUT) and isinstance(value, memoryview)
    ]


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
    """The tensor type that a type is, or is an optional one of."""
    yield from _messages(kind, _TYPE_TENSOR)
    for optional in _messages(kind, _TYPE_OPTIONAL):
        for element in _messages(optional, _OPTIONAL_ELEMENT):
            yield from _messages(element, _TYPE_TENSOR)


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, value in _fields(message):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message: numbers as such, all that has a length as a view."""
    place, end = 0, len(message)
    while place < end:
        key, place = _varint(message, place)
        kind = key & 7
        if kind == _LENGTH_DELIMITED:
            length, place = _varint(message, place)
            yield key >> 3, message[place : place + length]
            place += length
        elif kind == _VARINT:
            number, place = _varint(message, place)
            yield key >> 3, number
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a protobuf field is stored in way {kind}, which ONNX does not use")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number at `place`, seven bits a byte and the least first, and the place behind it."""
    number = shift = 0
    while True:
        byte = message[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
