"""Tensors in binary form, as Triton's extension of the Open Inference Protocol defines it.

A tensor is its elements in row-major order, little-endian and without padding; `BOOL` is a byte of 0 or 1,
and an element of `BYTES` is a 4-byte length and as many bytes, here of UTF-8.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from inferpool.errors import InvalidInput, MalformedBody, ModelFailed
from inferpool.tensors import ANY, Array, Signature, Tensors, TensorSpec, check_inputs, shape_text
from inferpool.wire.nested_lists import product

_LENGTH: Final = struct.Struct("<I")


def read_binary(
    spec: TensorSpec, shape: tuple[int, ...], body: bytes | memoryview, start: int, size: int
) -> Array:
    """The tensor in `size` bytes of the body; a view of them where they are aligned.

    Raises MalformedBody where they are not as many as `shape` takes, InvalidInput where one cannot be.
    """
    if spec.datatype == "BYTES":
        return _texts(spec, shape, bytes(body[start : start + size]))
    expected = spec.dtype.itemsize * product(shape)
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
    view: Array = np.frombuffer(body, spec.dtype.newbyteorder("<"), product(shape), start)
    # Runtimes are promised aligned elements; the JSON header ends where it ends.
    tensor = view.astype(spec.dtype, copy=not view.flags.aligned)
    if spec.datatype == "BOOL" and int(tensor.view(np.uint8).max()) > 1:
        place = int(np.flatnonzero(tensor.view(np.uint8) > 1)[0])
        raise InvalidInput(
            f'tensor "{spec.name}" has byte {tensor.view(np.uint8)[place]} for element {place};'
            " BOOL takes 0 and 1",
            tensor=spec.name,
            expected="BOOL",
        )
    return tensor.reshape(shape)


def from_raw(signature: Signature, body: bytes | memoryview) -> Tensors:
    """The only input, its shape found from the size of the body.

    Triton takes this for models of one input with at most one dimension that may vary, beside the rows, of
    which it takes one. Here the rows are counted too where they are what varies. Raises InvalidInput where
    the shape does not follow, and what `read_binary` and `check_inputs` raise.
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
        texts = _texts(spec, (1,) * len(shape), _LENGTH.pack(len(body)) + body)
        return {spec.name: texts}
    if shape.count(ANY) > 1 and shape[0] == ANY:
        shape[0] = 1
    if shape.count(ANY) > 1:
        raise _not_raw(spec)
    if ANY in shape:
        step = spec.dtype.itemsize * product(size for size in shape if size != ANY)
        shape[shape.index(ANY)] = len(body) // step if step else 0
    tensors = {spec.name: read_binary(spec, tuple(shape), body, 0, len(body))}
    check_inputs(signature, tensors)
    return tensors


def to_binary(tensor: Array) -> bytes | memoryview:
    """The elements of `tensor`, a view where it is laid out so; raises ModelFailed for what is no text."""
    if tensor.dtype == np.object_:
        try:
            encoded = [str(text).encode() for text in tensor.flat]
        except UnicodeEncodeError as error:
            raise ModelFailed("an output of the model holds what is no Unicode text") from error
        return b"".join([part for text in encoded for part in (_LENGTH.pack(len(text)), text)])
    if not tensor.size:
        return b""
    little = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _texts(spec: TensorSpec, shape: tuple[int, ...], content: bytes) -> Array:
    """The strings in `content`, each behind its length."""
    expected = product(shape)
    texts: list[str] = []
    place = 0
    while place < len(content):
        end = place + 4
        if end <= len(content):
            end += _LENGTH.unpack_from(content, place)[0]
        if end > len(content) or end < place + 4:
            raise MalformedBody(
                f'tensor "{spec.name}" is truncated in element {len(texts)}',
                tensor=spec.name,
                expected=end,
                got=len(content),
            )
        try:
            texts.append(content[place + 4 : end].decode())
        except UnicodeDecodeError:
            raise InvalidInput(
                f'tensor "{spec.name}" is not UTF-8 in element {len(texts)}; BYTES takes text',
                tensor=spec.name,
                expected="BYTES",
            ) from None
        place = end
    if len(texts) != expected:
        raise MalformedBody(
            f'tensor "{spec.name}" has {len(texts)} strings; shape {shape_text(shape)} takes {expected}',
            tensor=spec.name,
            expected=expected,
            got=len(texts),
        )
    return np.array(texts, dtype=np.object_).reshape(shape)


def _not_raw(spec: TensorSpec) -> InvalidInput:
    return InvalidInput(
        f'the shape of tensor "{spec.name}", {shape_text(spec.shape)}, does not follow from the size of a'
        " raw body: send a JSON header",
        tensor=spec.name,
    )
