"""Writes the ONNX graph that looks pixels up in a table, as the bytes of an ONNX file.

The graph has a handful of nodes. Serving does not need the package `onnx`, so the few protobuf messages are
written here. The numbers of fields and types are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from inferpool.pixel_table import Normalisation
from inferpool.tensors import Array

PIXELS: Final = "pixels"
"""The name of the graph's input."""
ROWS: Final = "rows"
"""The name of the graph's output."""

_IR_VERSION: Final = 8
_OPSET: Final = 17
_ELEMENTS: Final = {"float32": 1, "uint8": 2, "uint16": 4, "int32": 6, "float16": 10, "float64": 11}
"""dtype to number (`TensorProto.DataType`). BF16 is handled as its bits (uint16)."""
_INT, _INTS = 2, 7
"""The kinds of attributes (`AttributeProto.AttributeType`)."""

_TO_CHANNELS_FIRST: Final = (0, 3, 1, 2)


def lookup_graph(normalisation: Normalisation) -> bytes:
    """The bytes of a model that computes `Normalisation.normalise`."""
    values = normalisation.values
    nodes, tensors, last = [], [_tensor("values", values.reshape(-1))], PIXELS
    colours, first = normalisation.channels > 1, _channels_first(normalisation)
    if first:
        # Transpose first, while a pixel is one byte.
        nodes.append(_node("Transpose", [last], "ordered", _ints("perm", _TO_CHANNELS_FIRST)))
        last = "ordered"
    nodes.append(_node("Cast", [last], "indexes", _int("to", _ELEMENTS["int32"])))
    last = "indexes"
    if colours:
        # The tables of all channels form one table, one after the other.
        starts = np.arange(0, values.size, values.shape[1], dtype=np.int32)
        tensors.append(_tensor("starts", starts.reshape(-1, 1, 1) if first else starts))
        nodes.append(_node("Add", [last, "starts"], "table_indexes"))
        last = "table_indexes"
    nodes.append(_node("Gather", ["values", last], ROWS))
    graph = b"".join(
        [
            *(_message(1, node) for node in nodes),
            _message(2, b"normalise"),
            *(_message(5, tensor) for tensor in tensors),
            _message(11, _value(PIXELS, _ELEMENTS["uint8"], pixel_shape(normalisation))),
            _message(12, _value(ROWS, _ELEMENTS[values.dtype.name], row_shape(normalisation))),
        ]
    )
    opset = _message(1, b"") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, opset)


def pixel_shape(normalisation: Normalisation) -> tuple[int, int, int]:
    """The shape of a row of pixels."""
    return normalisation.height, normalisation.width, normalisation.channels


def row_shape(normalisation: Normalisation) -> tuple[int, int, int]:
    """The shape of an output row: the model's own, or a shape with the same numbers in the same order."""
    height, width, channels = pixel_shape(normalisation)
    return (channels, height, width) if _channels_first(normalisation) else (height, width, channels)


def _channels_first(normalisation: Normalisation) -> bool:
    """Whether the pixels have to be transposed. Grey pixels need not, whatever the layout."""
    return normalisation.layout == "CHW" and normalisation.channels > 1


def _node(kind: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    names = b"".join(_message(1, name.encode()) for name in inputs)
    settings = b"".join(_message(5, attribute) for attribute in attributes)
    return (
        names
        + _message(2, output.encode())
        + _message(3, kind.encode())
        + _message(4, kind.encode())
        + settings
    )


def _int(name: str, number: int) -> bytes:
    return _message(1, name.encode()) + _number(3, number) + _number(20, _INT)


def _ints(name: str, numbers: Sequence[int]) -> bytes:
    return (
        _message(1, name.encode()) + b"".join(_number(8, number) for number in numbers) + _number(20, _INTS)
    )


def _tensor(name: str, array: Array) -> bytes:
    sizes = b"".join(_number(1, size) for size in array.shape)
    kind = _number(2, _ELEMENTS[array.dtype.name])
    return sizes + kind + _message(8, name.encode()) + _message(9, array.tobytes())


def _value(name: str, element: int, shape: Sequence[int]) -> bytes:
    """An input or output whose rows have this shape."""
    sizes = [_message(1, _message(2, b"n")), *(_message(1, _number(1, size)) for size in shape)]
    kind = _number(1, element) + _message(2, b"".join(sizes))
    return _message(1, name.encode()) + _message(2, _message(1, kind))


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """A protobuf varint: seven bits in each byte, the least significant first."""
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*coded, number])
