"""The graph that looks pixels up in a table, for ONNX Runtime, as the bytes of an ONNX file.

It is a handful of nodes, and the package `onnx`, which would write them, is nothing that serving needs: so
the few messages of protobuf on the way are written here. Numbers of fields and types are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from inferpool.pixel_table import Normalisation
from inferpool.tensors import Array

PIXELS: Final = "pixels"
"""The graph's input."""
ROWS: Final = "rows"
"""Its output."""

_IR_VERSION: Final = 8
_OPSET: Final = 17
_ELEMENTS: Final = {"float32": 1, "uint8": 2, "uint16": 4, "int32": 6, "float16": 10, "float64": 11}
"""dtype to number (`TensorProto.DataType`); BF16 goes by its bits, as it does everywhere."""
_INT, _INTS = 2, 7
"""Kinds of attributes (`AttributeProto.AttributeType`)."""

_TO_CHANNELS_FIRST: Final = (0, 3, 1, 2)


def lookup_graph(normalisation: Normalisation) -> bytes:
    """The bytes of a model that does what `Normalisation.normalise` does."""
    values = normalisation.values
    nodes, tensors, last = [], [_tensor("values", values.reshape(-1))], PIXELS
    colours, first = normalisation.channels > 1, _channels_first(normalisation)
    if first:
        # Now, while a pixel is one byte.
        nodes.append(_node("Transpose", [last], "ordered", _ints("perm", _TO_CHANNELS_FIRST)))
        last = "ordered"
    nodes.append(_node("Cast", [last], "places", _int("to", _ELEMENTS["int32"])))
    last = "places"
    if colours:
        # One table for all channels, one behind the other.
        starts = np.arange(0, values.size, values.shape[1], dtype=np.int32)
        tensors.append(_tensor("starts", starts.reshape(-1, 1, 1) if first else starts))
        nodes.append(_node("Add", [last, "starts"], "placed"))
        last = "placed"
    nodes.append(_node("Gather", ["values", last], ROWS))
    graph = b"".join(
        [
            *(_message(1, node) for node in nodes),
            _message(2, b"normalise"),
            *(_message(5, tensor) for tensor in tensors),
            _message(11, _value(PIXELS, _ELEMENTS["uint8"], taken_shape(normalisation))),
            _message(12, _value(ROWS, _ELEMENTS[values.dtype.name], given_shape(normalisation))),
        ]
    )
    opset = _message(1, b"") + _number(2, _OPSET)
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, opset)


def taken_shape(normalisation: Normalisation) -> tuple[int, int, int]:
    """The shape of a row of pixels."""
    return normalisation.height, normalisation.width, normalisation.channels


def given_shape(normalisation: Normalisation) -> tuple[int, int, int]:
    """The shape of a row that comes out: the model's, or one of as many numbers in the same order."""
    height, width, channels = taken_shape(normalisation)
    return (channels, height, width) if _channels_first(normalisation) else (height, width, channels)


def _channels_first(normalisation: Normalisation) -> bool:
    """Whether pixels have to change places; grey ones need not, whatever the layout."""
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
    """An input or output, rows of this shape."""
    sizes = [_message(1, _message(2, b"n")), *(_message(1, _number(1, size)) for size in shape)]
    kind = _number(1, element) + _message(2, b"".join(sizes))
    return _message(1, name.encode()) + _message(2, _message(1, kind))


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Seven bits a byte, the least first."""
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*coded, number])
