"""The bodies of the Open Inference Protocol v2: JSON, and JSON followed by tensors in binary form.

The source is the protocol's REST page and three of Triton's extensions to it: binary tensor data,
classification and schedule policy. In binary form a tensor is its elements in row-major order, little-endian
and without padding; `BOOL` is a byte of 0 or 1, and an element of `BYTES` is a 4-byte length and as many
bytes, here of UTF-8. A body of header length 0 is raw: nothing but the one input's elements.

Fields and parameters that this protocol does not name are let through, for clients send their own. Where the
protocol leaves a choice: JSON answers have flat `data`; a number that is not finite is `null` there and the
output's parameters say `"non_finite": true`; `BF16` in JSON answers is written as the numbers that the bits
stand for; an output that is no tensor (a sequence or a map) is `BYTES` of JSON text, one for each element of
a sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from service.errors import InvalidInput, MalformedBody, ModelFailed
from service.tensors import (
    ANY,
    DTYPES,
    JSON,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    check_inputs,
    name_text,
    shape_text,
    unknown_input,
)
from service.wire.arrays import MAX_RANK, bf16_to_fp32, fit, product, read_nested, value_text
from service.wire.document import Declined, Document
from service.wire.json import has_non_finite, open_large, read_object, whole_number, write

_LENGTH: Final = struct.Struct("<I")
_MAX_ELEMENTS: Final = 2**60 - 1
"""More than any memory holds, and with 8 bytes each still no more than numpy can count."""
_MAX_CLASSIFIED: Final = 1_000_000
"""Elements that are sorted for one classification, as in Triton."""


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names.

    Attributes:
        name: as the model spells it.
        binary_data: whether it is to be answered in binary form; None leaves it to the request.
        classification: how many best classes to answer instead of the tensor; 0 for the tensor itself.
        parameters: what else the request says of it.
    """

    name: str
    binary_data: bool | None = None
    classification: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Input:
    """One member of `inputs`: `data` in JSON, or else `size` bytes of the body from `start`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any = None
    start: int = 0
    size: int = 0
    binary: bool = False


class InferRequest:
    """One inference call of the protocol, before its model is known.

    Attributes:
        id: the caller's name for the request, or None.
        parameters: the request's parameters as they came.
        timeout_ms: milliseconds the caller will wait (`timeout` counts microseconds; 0 is none).
        priority: 0 is the default, 1 the most urgent, larger is less urgent.
        outputs: the outputs asked for, or None for all.
        binary_data_output: whether outputs are in binary form where they do not say.
    """

    __slots__ = (
        "_body",
        "_document",
        "_inputs",
        "binary_data_output",
        "id",
        "outputs",
        "parameters",
        "priority",
        "timeout_ms",
    )

    def __init__(
        self,
        fields: Mapping[str, Any],
        body: bytes | memoryview,
        start: int | None,
        document: Document | None,
    ) -> None:
        """Check and keep `fields`, the JSON part; binary data starts at `start`, None where there is none.

        Raises InvalidInput or MalformedBody naming what is wrong.
        """
        self.id = _optional(fields, "id", str, "a string")
        self.parameters: Mapping[str, Any] = _optional(fields, "parameters", dict, "an object") or {}
        timeout_us = _count(self.parameters, "timeout")
        self.timeout_ms = timeout_us / 1000 if timeout_us else None
        self.priority = _count(self.parameters, "priority")
        self.binary_data_output = bool(
            _optional(self.parameters, "binary_data_output", bool, "true or false", "parameters.")
        )
        self.outputs = _requested(fields.get("outputs"))
        self._body = body
        self._document = document
        self._inputs: list[_Input] | None = _inputs(fields, body, start)

    @classmethod
    def raw(cls, body: bytes | memoryview) -> InferRequest:
        """The request that `body` is when it is nothing but the elements of the only input."""
        request = cls({"inputs": [], "parameters": {"binary_data_output": True}}, body, len(body), None)
        request._inputs = None
        return request

    def tensors(self, signature: Signature) -> Tensors:
        """The inputs as `signature` takes them, views of the body where it is aligned; call it once.

        Raises InvalidInput naming the tensor that is unknown, missing, irregular, or of another datatype,
        shape or range, and MalformedBody where its bytes are not those of its datatype and shape.
        """
        if self._inputs is None:
            return _raw_tensors(signature, self._body)
        document, self._document = self._document, None
        if document is not None:
            try:
                tensors = _tensors(signature, self._inputs, self._body, document.read)
                if document.proven():
                    return tensors
            except (InvalidInput, Declined):
                pass
            finally:
                self._inputs = []
                document.close()
            self._inputs = _inputs(read_object(self._body), self._body, None)
        return _tensors(signature, self._inputs, self._body, read_nested)


def parse_infer(body: bytes | memoryview, header_length: int | None) -> InferRequest:
    """Read a body whose first `header_length` bytes are JSON: None for all of it, 0 for a raw body.

    Tensors in binary form are views of `body` where they are aligned in memory.

    Raises MalformedBody where the framing or the JSON is not sound, InvalidInput where a field is wrong.
    """
    if header_length is None:
        body = bytes(body)
        document = open_large(body)
        if document is not None:
            try:
                return InferRequest(document.fields, body, None, document)
            except InvalidInput:  # read the plain way, it is worded in terms of what was sent
                document.close()
        return InferRequest(read_object(body), body, None, None)
    if header_length == 0:
        return InferRequest.raw(body)
    if not 0 < header_length <= len(body):
        raise MalformedBody(
            f"the JSON header is said to take {header_length} bytes, the body has {len(body)}",
            expected=header_length,
            got=len(body),
        )
    return InferRequest(read_object(memoryview(body)[:header_length]), body, header_length, None)


def encode_infer(
    model: str,
    version: str,
    request_id: str,
    outputs: Mapping[str, Any],
    requested: Sequence[RequestedOutput] | None,
    binary_default: bool,
    signature: Signature,
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[list[bytes | memoryview], int | None]:
    """The answer in parts, and the length of its JSON header where parts in binary form follow it.

    `requested` are outputs that the model has, None for all of `outputs`; `labels` name the classes of a
    classification, by output. An empty `request_id` is left out. Large arrays are not copied: the parts are
    views of them. Raises InvalidInput where a classification is asked of an output that has no numbers,
    ModelFailed where an output cannot be written.
    """
    if requested is None:
        requested = [RequestedOutput(name) for name in outputs]
    entries: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    binary_any = False
    for wanted in requested:
        spec = signature.outputs_by_name.get(wanted.name)
        tensor, datatype = _output(outputs[wanted.name], spec)
        if wanted.classification:
            tensor, datatype = _classify(wanted, tensor, datatype, labels.get(wanted.name, ())), "BYTES"
        entry: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": tensor.shape}
        if binary_default if wanted.binary_data is None else wanted.binary_data:
            part = _to_bytes(tensor)
            entry["parameters"] = {"binary_data_size": len(part)}
            parts.append(part)
            binary_any = True
        else:
            numbers = bf16_to_fp32(tensor) if datatype == "BF16" else tensor
            entry["data"] = numbers.reshape(-1)
            if numbers.dtype.kind == "f" and has_non_finite(numbers):
                entry["parameters"] = {"non_finite": True}
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if request_id:
        answer["id"] = request_id
    header = write(answer)
    return [header, *filter(len, parts)], len(header) if binary_any else None


def _optional(fields: Mapping[str, Any], name: str, kind: type, expected: str, where: str = "") -> Any:
    value = fields.get(name)
    if value is not None and type(value) is not kind:
        raise _wrong_field(f"{where}{name}", value, expected)
    return value


def _count(parameters: Mapping[str, Any], name: str, where: str = "parameters.") -> int | None:
    value = parameters.get(name)
    if value is None:
        return None
    count = whole_number(value)
    if count is None or count < 0:
        raise _wrong_field(f"{where}{name}", value, "a whole number from 0")
    return count


def _wrong_field(name: str, value: Any, expected: str) -> InvalidInput:
    got = value_text(value)
    return InvalidInput(f'"{name}" is {got}; it takes {expected}', field=name, value=got)


def _members(fields: Mapping[str, Any], name: str, place: int) -> tuple[str, Mapping[str, Any]]:
    """The name and the parameters of a member of `inputs` or `outputs`."""
    where = f"{name}[{place}]"
    if not isinstance(fields, dict):
        raise _wrong_field(where, fields, "an object")
    if not isinstance(fields.get("name"), str):
        raise _wrong_field(f"{where}.name", fields.get("name"), "a string")
    parameters = _optional(fields, "parameters", dict, "an object", f"{where}.") or {}
    if "shared_memory_region" in parameters:
        raise InvalidInput(
            f'"{where}" is in shared memory, which this server does not take: send its data',
            tensor=fields["name"],
        )
    return fields["name"], parameters


def _requested(value: Any) -> tuple[RequestedOutput, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _wrong_field("outputs", value, "a list of objects")
    found: dict[str, RequestedOutput] = {}
    for place, fields in enumerate(value):
        name, parameters = _members(fields, "outputs", place)
        where = f"outputs[{place}].parameters."
        if name in found:
            raise InvalidInput(f'output "{name}" is asked for twice', tensor=name_text(name)[1:-1])
        found[name] = RequestedOutput(
            name,
            _optional(parameters, "binary_data", bool, "true or false", where),
            _count(parameters, "classification", where) or 0,
            {key: parameters[key] for key in parameters if key not in ("binary_data", "classification")},
        )
    return tuple(found.values()) or None


def _inputs(fields: Mapping[str, Any], body: bytes | memoryview, start: int | None) -> list[_Input]:
    """The members of `inputs`, with the part of the body that each one's binary data is."""
    listed = fields.get("inputs")
    if not isinstance(listed, list):
        raise _wrong_field("inputs", listed, "a list of objects")
    found: dict[str, _Input] = {}
    end = start or 0
    for place, entry in enumerate(listed):
        name, parameters = _members(entry, "inputs", place)
        if name in found:
            raise InvalidInput(f"tensor {name_text(name)} comes twice", tensor=name_text(name)[1:-1])
        datatype = entry.get("datatype")
        if not isinstance(datatype, str) or datatype not in DTYPES:
            raise InvalidInput(
                f"tensor {name_text(name)} has datatype {value_text(datatype)};"
                f" there are {', '.join(DTYPES)}",
                tensor=name_text(name)[1:-1],
                got=value_text(datatype),
                expected=list(DTYPES),
            )
        shape = _shape(name, entry.get("shape"))
        size = _count(parameters, "binary_data_size", f"inputs[{place}].parameters.")
        if (size is None) == ("data" not in entry):
            raise InvalidInput(
                f'tensor {name_text(name)} has {"neither" if size is None else "both"} "data"'
                f' {"nor" if size is None else "and"} "binary_data_size"; it takes one of them',
                tensor=name_text(name)[1:-1],
            )
        if size is None:
            found[name] = _Input(name, datatype, shape, entry["data"])
            continue
        if start is None:
            raise MalformedBody(
                f'tensor {name_text(name)} has "binary_data_size", but no Inference-Header-Content-Length'
                " says where the JSON ends",
                tensor=name_text(name)[1:-1],
            )
        if end + size > len(body):
            raise MalformedBody(
                f"tensor {name_text(name)} is truncated:"
                f" {size} bytes are announced, {len(body) - end} are there",
                tensor=name_text(name)[1:-1],
                expected=size,
                got=len(body) - end,
            )
        found[name] = _Input(name, datatype, shape, start=end, size=size, binary=True)
        end += size
    if start is not None and end < len(body):
        raise MalformedBody(
            f"{len(body) - end} bytes follow the last tensor", expected=end - start, got=len(body) - start
        )
    return list(found.values())


def _shape(name: str, value: Any) -> tuple[int, ...]:
    sizes = tuple(map(whole_number, value)) if isinstance(value, list) else (None,)
    shape = tuple(size for size in sizes if size is not None and size >= 0)
    if len(shape) < len(sizes) or len(shape) > MAX_RANK or product(filter(None, shape)) > _MAX_ELEMENTS:
        got = (
            f"[{', '.join(map(value_text, value[:MAX_RANK]))}]"
            if isinstance(value, list)
            else value_text(value)
        )
        raise InvalidInput(
            f'tensor {name_text(name)} has no "shape"'
            if value is None
            else f"tensor {name_text(name)} has shape {got}; it takes at most {MAX_RANK} sizes from 0,"
            f" of {_MAX_ELEMENTS} elements at most",
            tensor=name_text(name)[1:-1],
            got=got,
        )
    return shape


def _tensors(
    signature: Signature,
    inputs: list[_Input],
    body: bytes | memoryview,
    read: Callable[[TensorSpec, Any], Array],
) -> Tensors:
    tensors: Tensors = {}
    for entry in inputs:
        spec = signature.inputs_by_name.get(entry.name)
        if spec is None:
            raise unknown_input(signature, entry.name)
        if entry.datatype != spec.datatype:
            raise InvalidInput(
                f'tensor "{entry.name}" is {entry.datatype}, the model takes {spec.datatype}',
                tensor=entry.name,
                expected=spec.datatype,
                got=entry.datatype,
            )
        if entry.binary:
            tensors[entry.name] = _from_bytes(spec, entry.shape, body, entry.start, entry.size)
        else:
            tensors[entry.name] = fit(spec, read(spec, entry.data), entry.shape)
    sentences = signature.instead
    if sentences is not None and sentences in tensors and tensors[sentences].shape[1:] == (1,):
        # As Triton's clients send strings: its models have a dimension beside the rows.
        tensors[sentences] = tensors[sentences].reshape(-1)
    check_inputs(signature, tensors)
    return tensors


def _from_bytes(
    spec: TensorSpec, shape: tuple[int, ...], body: bytes | memoryview, start: int, size: int
) -> Array:
    """The tensor in `size` bytes of the body; a view of them where they are aligned."""
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


def _raw_tensors(signature: Signature, body: bytes | memoryview) -> Tensors:
    """The only input, its shape found from the size of the body.

    Triton takes this for models of one input with at most one dimension that may vary, beside the rows, of
    which it takes one. Here the rows are counted too where they are what varies.
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
    tensors = {spec.name: _from_bytes(spec, tuple(shape), body, 0, len(body))}
    check_inputs(signature, tensors)
    return tensors


def _not_raw(spec: TensorSpec) -> InvalidInput:
    return InvalidInput(
        f'the shape of tensor "{spec.name}", {shape_text(spec.shape)}, does not follow from the size of a'
        " raw body: send a JSON header",
        tensor=spec.name,
    )


def _output(value: Any, spec: TensorSpec | None) -> tuple[Array, str]:
    """An output as a tensor, and its datatype."""
    is_tensor = isinstance(value, (np.ndarray, np.generic))
    if is_tensor and (spec is None or spec.datatype != JSON):
        tensor = np.asarray(value)
        return tensor, spec.datatype if spec else _datatype_of(tensor)
    elements = value if isinstance(value, list) else [value]
    return np.array([write(element).decode() for element in elements], dtype=np.object_), "BYTES"


def _datatype_of(tensor: Array) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)


def _to_bytes(tensor: Array) -> bytes | memoryview:
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


def _classify(wanted: RequestedOutput, tensor: Array, datatype: str, labels: Sequence[str]) -> Array:
    """The best classes of each row as `value:index[:label]`, best first; equal ones in order of index."""
    if datatype in ("BOOL", "BYTES"):
        raise InvalidInput(
            f'output "{wanted.name}" is {datatype}; a classification takes numbers', tensor=wanted.name
        )
    numbers = bf16_to_fp32(tensor) if datatype == "BF16" else tensor
    rows = numbers.reshape(len(numbers), -1) if numbers.ndim > 1 and numbers.size else numbers.reshape(1, -1)
    if numbers.size > _MAX_CLASSIFIED:
        raise InvalidInput(
            f'output "{wanted.name}" has {numbers.size} elements; a classification takes {_MAX_CLASSIFIED}',
            tensor=wanted.name,
        )
    count = min(wanted.classification, rows.shape[1])
    floats = numbers.dtype.kind == "f"
    classes: Array = np.empty((len(rows), count), dtype=np.object_)
    for place, row in enumerate(rows):
        best = np.argsort(-row if floats else ~row, kind="stable")[:count]
        for rank, index in enumerate(best.tolist()):
            # Triton prints floats with six digits behind the point.
            value = f"{row[index]:f}" if floats else str(row[index])
            label = f":{labels[index]}" if index < len(labels) else ""
            classes[place, rank] = f"{value}:{index}{label}"
    return classes if numbers.ndim > 1 else classes.reshape(-1)
