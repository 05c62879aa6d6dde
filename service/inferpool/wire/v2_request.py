"""Requests of the Open Inference Protocol v2: JSON, alone or followed by tensors in binary form.

The sources are the protocol's REST page and three of Triton's extensions to it: binary tensor data,
classification and schedule policy. A body with header length 0 is raw: it holds the elements of the only
input.

Unknown fields and parameters are ignored, because clients send fields of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from inferpool.allowance import UNLIMITED, Allowance
from inferpool.errors import InvalidInput, MalformedBody
from inferpool.tensors import (
    DTYPES,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    check_inputs,
    element_count,
    name_text,
    unknown_input,
    value_text,
)
from inferpool.wire.json_bodies import extract_numbers, read_again, read_object, whole_number, wrong_field
from inferpool.wire.json_numbers import FallBack, read_extracted
from inferpool.wire.large_bytes import as_bytes
from inferpool.wire.native_json import check_id
from inferpool.wire.nested_lists import MAX_RANK, in_shape, read_nested
from inferpool.wire.v2_binary import from_raw, read_binary

_MAX_ELEMENTS: Final = 2**60 - 1
"""More than any memory holds; with 8 bytes each, numpy can still count them."""
COPIED_JSON_BYTES: Final = 64 * 1024
"""JSON of at most so many bytes before binary tensors is copied before it is parsed."""
_MOST_MEMBERS: Final = 4096
"""The most inputs of a request, and the most outputs that it may ask for. No model has as many."""
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class RequestedOutput(NamedTuple):
    """An output that a request names.

    Attributes:
        name: the name in the model.
        binary_data: whether to send it in binary form; None if the request's `binary_data_output` decides.
        classification: how many of the best classes to send instead of the tensor; 0 sends the tensor.
        parameters: its other parameters in the request.
    """

    name: str
    binary_data: bool | None = None
    classification: int = 0
    parameters: Mapping[str, Any] = _NOTHING


class _Input(NamedTuple):
    """One member of `inputs`: either `data` from JSON, or `size` bytes of the body from `start` on."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any = None
    start: int = 0
    size: int = 0
    binary: bool = False


class InferRequest:
    """One inference request of the protocol, whose model is not resolved yet.

    Attributes:
        id: the client's name for the request, or None.
        parameters: the request's parameters as they were sent.
        timeout_ms: how many milliseconds the client waits (`timeout` counts microseconds, 0 means no limit).
        priority: 0 is the default, 1 the most urgent, larger is less urgent.
        outputs: the outputs asked for, or None for all.
        binary_data_output: whether to send outputs in binary form unless they say otherwise.
    """

    __slots__ = (
        "_allowance",
        "_body",
        "_extracted",
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
        extracted: bool,
        allowance: Allowance,
    ) -> None:
        """Check and keep `fields`, the JSON part, which are `extracted` by `json_numbers` or plain.

        Binary data starts at the byte `start`, None if there is none. Raises InvalidInput or MalformedBody
        with the field at fault.
        """
        self.id = check_id(_optional(fields, "id", str, "a string"))
        self.parameters: Mapping[str, Any] = _optional(fields, "parameters", dict, "an object") or {}
        timeout_us = _count(self.parameters, "timeout")
        self.timeout_ms = timeout_us / 1000 if timeout_us else None
        self.priority = _count(self.parameters, "priority")
        self.binary_data_output = bool(
            _optional(self.parameters, "binary_data_output", bool, "true or false", "parameters.")
        )
        self.outputs = _requested(fields.get("outputs"))
        self._allowance = allowance
        self._body = body
        self._extracted = extracted
        self._inputs: list[_Input] | None = _inputs(fields, body, start)

    @classmethod
    def raw(cls, body: bytes | memoryview, allowance: Allowance) -> InferRequest:
        """Return the request whose `body` holds only the elements of the only input."""
        fields = {"inputs": [], "parameters": {"binary_data_output": True}}
        request = cls(fields, body, len(body), False, allowance)
        request._inputs = None
        return request

    def tensors(self, signature: Signature) -> Tensors:
        """Return the inputs as `signature` takes them, as views of an aligned body; may be called once.

        Raises InvalidInput with the tensor that is unknown, missing, irregular, or of another datatype,
        shape or range, and MalformedBody if the number of its bytes does not match its datatype and shape.
        """
        if self._inputs is None:
            return from_raw(signature, self._body)
        if self._extracted:
            self._extracted = False
            fault: InvalidInput | None = None
            try:
                return _tensors(signature, self._inputs, self._body, read_extracted, self._allowance)
            except InvalidInput as error:
                fault = error
            except FallBack:
                pass
            finally:
                self._inputs = []
            self._inputs = _inputs(read_again(self._body, self._allowance, fault), self._body, None)
        return _tensors(signature, self._inputs, self._body, read_nested, self._allowance)


def parse_infer(
    body: bytes | memoryview, header_length: int | None, allowance: Allowance = UNLIMITED
) -> InferRequest:
    """Read a body whose first `header_length` bytes are JSON: all of it if None, none of it (raw) if 0.

    Tensors in binary form are views of `body` if they are aligned in memory.

    Raises MalformedBody if the lengths or the JSON are wrong, InvalidInput if a field is wrong, and what
    `check_json` raises.
    """
    if header_length is None:
        body = as_bytes(body)
        fields = extract_numbers(body, allowance)
        fault: InvalidInput | None = None
        if fields is not None:
            try:
                return InferRequest(fields, body, None, True, allowance)
            except InvalidInput as error:  # its message lacks plain values, so the fields are read again
                fault = error
                fields = None
        return InferRequest(read_again(body, allowance, fault), body, None, False, allowance)
    if header_length == 0:
        return InferRequest.raw(body, allowance)
    if not 0 < header_length <= len(body):
        raise MalformedBody(
            f"the JSON header is announced with {header_length} bytes, the body has {len(body)}",
            expected=header_length,
            got=len(body),
        )
    header: bytes | memoryview = memoryview(body)[:header_length]
    if header_length <= COPIED_JSON_BYTES:
        # An engine may share the memory of the body. Parsers rely on text that does not change meanwhile.
        header = bytes(header)
    fields = read_object(header, allowance=allowance)
    return InferRequest(fields, body, header_length, False, allowance)


def _optional(fields: Mapping[str, Any], name: str, kind: type, expected: str, prefix: str = "") -> Any:
    value = fields.get(name)
    if value is not None and type(value) is not kind:
        raise wrong_field(f"{prefix}{name}", value, expected)
    return value


def _count(parameters: Mapping[str, Any], name: str, prefix: str = "parameters.") -> int | None:
    value = parameters.get(name)
    if value is None:
        return None
    count = whole_number(value)
    if count is None or count < 0:
        raise wrong_field(f"{prefix}{name}", value, "a whole number from 0")
    return count


def _check_count(name: str, members: list[Any]) -> None:
    if len(members) > _MOST_MEMBERS:
        raise InvalidInput(
            f'"{name}" has {len(members)} members; it takes {_MOST_MEMBERS}', field=name, got=len(members)
        )


def _member(fields: Mapping[str, Any], list_name: str, index: int) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the parameters of a member of `inputs` or `outputs`."""
    path = f"{list_name}[{index}]"
    if not isinstance(fields, dict):
        raise wrong_field(path, fields, "an object")
    if not isinstance(fields.get("name"), str):
        raise wrong_field(f"{path}.name", fields.get("name"), "a string")
    parameters = _optional(fields, "parameters", dict, "an object", f"{path}.") or {}
    if "shared_memory_region" in parameters:
        raise InvalidInput(
            f'"{path}" is in shared memory, which this server does not read: send its data',
            tensor=name_text(fields["name"])[1:-1],
        )
    return fields["name"], parameters


def _requested(value: Any) -> tuple[RequestedOutput, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise wrong_field("outputs", value, "a list of objects")
    _check_count("outputs", value)
    found: dict[str, RequestedOutput] = {}
    for index, fields in enumerate(value):
        name, parameters = _member(fields, "outputs", index)
        prefix = f"outputs[{index}].parameters."
        if name in found:
            raise InvalidInput(f"output {name_text(name)} is asked for twice", tensor=name_text(name)[1:-1])
        found[name] = RequestedOutput(
            name,
            _optional(parameters, "binary_data", bool, "true or false", prefix),
            _count(parameters, "classification", prefix) or 0,
            {key: parameters[key] for key in parameters if key not in ("binary_data", "classification")},
        )
    return tuple(found.values()) or None


def _inputs(fields: Mapping[str, Any], body: bytes | memoryview, start: int | None) -> list[_Input]:
    """Return the members of `inputs`, with the bounds of their binary data in the body."""
    listed = fields.get("inputs")
    if not isinstance(listed, list):
        raise wrong_field("inputs", listed, "a list of objects")
    _check_count("inputs", listed)
    found: dict[str, _Input] = {}
    end = start or 0
    for index, entry in enumerate(listed):
        name, parameters = _member(entry, "inputs", index)
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
        size = _count(parameters, "binary_data_size", f"inputs[{index}].parameters.")
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
    sizes = tuple(map(whole_number, value[: MAX_RANK + 1])) if isinstance(value, list) else (None,)
    shape = tuple(size for size in sizes if size is not None and size >= 0)
    if len(shape) < len(sizes) or len(shape) > MAX_RANK or element_count(filter(None, shape)) > _MAX_ELEMENTS:
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
    allowance: Allowance,
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
            tensors[entry.name] = read_binary(spec, entry.shape, body, entry.start, entry.size, allowance)
        else:
            tensors[entry.name] = in_shape(spec, read(spec, entry.data), entry.shape)
    sentences = signature.substitute_input
    if sentences is not None and sentences in tensors and tensors[sentences].shape[1:] == (1,):
        # Triton's clients send strings so, because its models have a dimension beside the rows.
        tensors[sentences] = tensors[sentences].reshape(-1)
    check_inputs(signature, tensors)
    return tensors
