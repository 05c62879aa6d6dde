"""Tensors in binary form, as Triton's extension of the Open Inference Protocol defines it.

A tensor is the list of its elements in row-major order, little-endian and without padding. An element of
`BOOL` is a byte of 0 or 1. An element of `BYTES` is a length of 4 bytes and that many bytes, which must be
UTF-8 here.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody, ModelFailed
from inferpool.tensors import (
    ANY,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    check_inputs,
    element_count,
    shape_text,
)
from inferpool.wire.json_bounds import COUNTED_BYTES, MOST_OBJECT_BYTES, STRING_BYTES

_LENGTH: Final = struct.Struct("<I")


def read_binary(
    spec: TensorSpec,
    shape: tuple[int, ...],
    body: bytes | memoryview,
    start: int,
    size: int,
    allowance: Allowance = UNLIMITED,
) -> Array:
    """Return the tensor in `size` bytes of the body from `start` on; a view of them if they are aligned.

    Raises MalformedBody if `shape` takes another number of bytes, InvalidInput if an element is impossible,
    BodyTooLarge if there are too many strings, and what `Allowance.take` raises.
    """
    if spec.datatype == "BYTES":
        if size > COUNTED_BYTES:
            _reserve_texts(spec, min(element_count(shape), size // _LENGTH.size), size, allowance)
        return _texts(spec, shape, bytes(body[start : start + size]))
    expected = spec.dtype.itemsize * element_count(shape)
    if size != expected:
        raise MalformedBody(
            f'tensor "{spec.name}" has {size} bytes; {spec.datatype} of shape {shape_text(shape)}'
            f" takes {expected}",
            tensor=spec.name,
            expected=expected,
            got=size,
        )
    if not expected:
        return np.empty(shape, dtype=spec.dtype)
    view: Array = np.frombuffer(body, spec.dtype.newbyteorder("<"), element_count(shape), start)
    # Runtimes expect aligned elements, but a JSON header may have any length.
    tensor = view.astype(spec.dtype, copy=not view.flags.aligned)
    if spec.datatype == "BOOL" and int(tensor.view(np.uint8).max()) > 1:
        position = int(np.flatnonzero(tensor.view(np.uint8) > 1)[0])
        raise InvalidInput(
            f'tensor "{spec.name}" has byte {tensor.view(np.uint8)[position]} for element {position};'
            " BOOL takes 0 and 1",
            tensor=spec.name,
            expected="BOOL",
        )
    return tensor.reshape(shape)


def from_raw(signature: Signature, body: bytes | memoryview) -> Tensors:
    """Return the only input, whose shape follows from the size of the body.

    Like Triton, takes models of one input with at most one variable dimension beside the rows, and then
    takes one row. Unlike Triton, takes any number of rows if no other dimension is variable. Raises
    InvalidInput if the shape does not follow from the size, and the errors of `read_binary` and
    `check_inputs`.
    """
    spec = signature.single_input
    if spec is None or spec.shape is None:
        raise InvalidInput(
            f"a raw body is one tensor; this model takes {len(signature.inputs)}: send a JSON header"
        )
    shape = list(spec.shape)
    if spec.datatype == "BYTES":
        if any(size not in (ANY, 1) for size in shape):
            raise _not_raw(spec)
        _reserve_texts(spec, 1, len(body), UNLIMITED)
        texts = _texts(spec, (1,) * len(shape), _LENGTH.pack(len(body)) + body)
        return {spec.name: texts}
    if shape.count(ANY) > 1 and shape[0] == ANY:
        shape[0] = 1
    if shape.count(ANY) > 1:
        raise _not_raw(spec)
    if ANY in shape:
        step = spec.dtype.itemsize * element_count(size for size in shape if size != ANY)
        shape[shape.index(ANY)] = len(body) // step if step else 0
    tensors = {spec.name: read_binary(spec, tuple(shape), body, 0, len(body))}
    check_inputs(signature, tensors)
    return tensors


def to_binary(tensor: Array) -> bytes | memoryview:
    """Return the elements of `tensor`, as a view if possible; raises ModelFailed if a string is not text."""
    if tensor.dtype == np.object_:
        try:
            encoded = [str(text).encode() for text in tensor.flat]
        except UnicodeEncodeError as error:
            raise ModelFailed("an output of the model holds a string that is not Unicode text") from error
        return b"".join([part for text in encoded for part in (_LENGTH.pack(len(text)), text)])
    if not tensor.size:
        return b""
    little = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _reserve_texts(spec: TensorSpec, count: int, size: int, allowance: Allowance) -> None:
    """Reserve the memory of `count` strings, of `size` bytes together."""
    objects = count * STRING_BYTES + size
    if objects > MOST_OBJECT_BYTES:
        raise BodyTooLarge(
            f'tensor "{spec.name}" has {count} strings, which take {objects} bytes of memory; the limit is'
            f" {MOST_OBJECT_BYTES}; send fewer rows at a time",
            limit=MOST_OBJECT_BYTES,
            got=objects,
        )
    # A character may take four bytes in memory and one here. The content is copied before it is taken apart.
    allowance.take(objects + 5 * size, f'reading the strings of tensor "{spec.name}"')


def _texts(spec: TensorSpec, shape: tuple[int, ...], content: bytes) -> Array:
    """Return the strings in `content`, each of which follows its length."""
    expected = element_count(shape)
    texts: list[str] = []
    start = 0
    while start < len(content) and len(texts) <= expected:
        end = start + 4
        if end <= len(content):
            end += _LENGTH.unpack_from(content, start)[0]
        if end > len(content):
            raise MalformedBody(
                f'tensor "{spec.name}" is truncated in element {len(texts)}',
                tensor=spec.name,
                expected=end,
                got=len(content),
            )
        try:
            texts.append(content[start + 4 : end].decode())
        except UnicodeDecodeError:
            raise InvalidInput(
                f'tensor "{spec.name}" is not UTF-8 in element {len(texts)}; BYTES takes text',
                tensor=spec.name,
                expected="BYTES",
            ) from None
        start = end
    if len(texts) != expected:
        raise MalformedBody(
            f'tensor "{spec.name}" has {_at_least(len(texts), expected)} strings; shape {shape_text(shape)}'
            f" takes {expected}",
            tensor=spec.name,
            expected=expected,
            got=len(texts),
        )
    return np.array(texts, dtype=np.object_).reshape(shape)


def _at_least(count: int, expected: int) -> str:
    return str(count) if count <= expected else f"more than {expected}"


def _not_raw(spec: TensorSpec) -> InvalidInput:
    return InvalidInput(
        f'the shape of tensor "{spec.name}", {shape_text(spec.shape)}, does not follow from the size of a'
        " raw body: send a JSON header",
        tensor=spec.name,
    )
