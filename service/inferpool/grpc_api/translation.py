"""Requests of the gRPC protocol as bodies of `/v2`, and responses of `/v2` as messages.

Tensors pass in the binary form of `/v2`, so the bytes of raw contents pass unchanged. Everything else about a
request is checked where a request of `/v2` is: here are only the checks of what `/v2` does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import numpy as np
import orjson

from inferpool.errors import InvalidInput, MalformedBody
from inferpool.grpc_api.messages import message
from inferpool.grpc_api.wire_format import RawContents
from inferpool.tensors import name_text, value_text
from inferpool.wire.nested_lists import MAX_RANK

_RESPONSE: Final = message("ModelInferResponse")
_BINARY_OUTPUT: Final = "binary_data_output"
_SIZE: Final = "binary_data_size"
_MOST_PARAMETERS: Final = 1024
_LENGTH_BYTES: Final = 4
"""Bytes of the length before each element of BYTES in binary form, little-endian."""

_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", ""),
}
"""The field of `InferTensorContents` for each datatype, and how binary form stores an element."""
_HELD_IN: Final = {"int_contents": "<i4", "uint_contents": "<u4"}
"""Fields whose elements may be out of the range of the tensor's datatype."""


class RestRequest(NamedTuple):
    """An inference request of `/v2`.

    Attributes:
        path: the path, quoted.
        header_length: bytes of the JSON, which is the first part.
        parts: the body.
        raw_outputs: whether the client wants outputs as raw contents.
    """

    path: str
    header_length: int
    parts: Sequence[bytes | bytearray | memoryview]
    raw_outputs: bool


def model_path(name: str, version: str, suffix: str) -> str:
    """Return the path of `/v2` for a model, or for a version of it unless `version` is empty.

    Raises InvalidInput if the name is empty.
    """
    if not name:
        raise InvalidInput('the request names no model; send its name as "model_name" or "name"')
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}{suffix}" if version else path + suffix


def to_rest(request: Any, raw: RawContents) -> RestRequest:
    """Translate a `ModelInferRequest` whose `raw_input_contents` are `raw`.

    Raises InvalidInput or MalformedBody if its contents do not belong to its inputs.
    """
    parameters = _values(request.parameters)
    # Outputs come as inputs did, unless the client says otherwise.
    raw_outputs = parameters.get(_BINARY_OUTPUT, bool(raw) or not request.inputs)
    if not isinstance(raw_outputs, bool):
        raise InvalidInput(
            f'the parameter "{_BINARY_OUTPUT}" is {value_text(raw_outputs)}; send true or false',
            field=_BINARY_OUTPUT,
        )
    if raw and len(raw) != len(request.inputs):
        raise MalformedBody(
            f'"raw_input_contents" has {len(raw)} members, and "inputs" has {len(request.inputs)}; send one'
            " for each input",
            expected=len(request.inputs),
            got=len(raw),
        )
    inputs: list[dict[str, Any]] = []
    contents: list[bytes | bytearray | memoryview] = []
    for index, tensor in enumerate(request.inputs):
        if len(tensor.shape) > MAX_RANK:
            raise InvalidInput(
                f"tensor {name_text(tensor.name)} has {len(tensor.shape)} dimensions; it takes at most"
                f" {MAX_RANK}",
                tensor=name_text(tensor.name)[1:-1],
            )
        data = _raw(tensor, raw[index]) if raw else _packed(tensor)
        contents.append(data)
        inputs.append(
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {**_values(tensor.parameters), _SIZE: len(data)},
            }
        )
    fields: dict[str, Any] = {"inputs": inputs, "parameters": {**parameters, _BINARY_OUTPUT: True}}
    if request.id:
        fields["id"] = request.id
    if request.outputs:
        fields["outputs"] = [
            {"name": output.name, "parameters": {**_values(output.parameters), "binary_data": True}}
            for output in request.outputs
        ]
    header = orjson.dumps(fields)
    path = model_path(request.model_name, request.model_version, "/infer")
    return RestRequest(path, len(header), [header, *contents], raw_outputs)


def to_message(body: bytes, header_length: int, *, raw: bool) -> bytes:
    """Translate a response of `/v2` whose outputs are in binary form, to a `ModelInferResponse`.

    Outputs become typed contents unless `raw`, or unless one of them has a datatype that raw contents alone
    can hold.
    """
    view = memoryview(body)
    fields = orjson.loads(view[:header_length])
    response = _RESPONSE(
        model_name=fields["model_name"], model_version=fields["model_version"], id=fields.get("id", "")
    )
    raw = raw or not all(entry["datatype"] in _FIELDS for entry in fields["outputs"])
    at = header_length
    for entry in fields["outputs"]:
        size = entry["parameters"][_SIZE]
        data = view[at : at + size]
        at += size
        output = response.outputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        if raw:
            response.raw_output_contents.append(bytes(data))
        else:
            field, dtype = _FIELDS[entry["datatype"]]
            elements = np.frombuffer(data, dtype).tolist() if dtype else _strings(data)
            getattr(output.contents, field).extend(elements)
    serialized: bytes = response.SerializeToString()
    return serialized


def _raw(tensor: Any, data: memoryview) -> memoryview:
    if tensor.HasField("contents"):
        raise InvalidInput(
            f'tensor {name_text(tensor.name)} has "contents", and the request has "raw_input_contents"; send'
            " one of them",
            tensor=name_text(tensor.name)[1:-1],
        )
    return data


def _packed(tensor: Any) -> bytearray | memoryview:
    """Return the typed contents of an input in the binary form of `/v2`."""
    name = name_text(tensor.name)
    known = _FIELDS.get(tensor.datatype)
    if known is None:
        raise InvalidInput(
            f"tensor {name} has datatype {value_text(tensor.datatype)}, for which there are no typed"
            ' contents; send "raw_input_contents"',
            tensor=name[1:-1],
            got=value_text(tensor.datatype),
        )
    field, dtype = known
    wrong = next((found.name for found, _ in tensor.contents.ListFields() if found.name != field), None)
    if wrong is not None:
        raise InvalidInput(
            f'tensor {name} is {tensor.datatype}, and has elements in "{wrong}"; send them in "{field}"',
            tensor=name[1:-1],
            expected=field,
            got=wrong,
        )
    elements = getattr(tensor.contents, field)
    expected = math.prod(tensor.shape)
    if len(elements) != expected:
        raise InvalidInput(
            f'tensor {name} has {len(elements)} elements in "{field}", and shape {list(tensor.shape)} takes'
            f" {value_text(expected)}",
            tensor=name[1:-1],
            got=len(elements),
        )
    if not dtype:
        strings = bytearray()
        for element in elements:
            strings += len(element).to_bytes(_LENGTH_BYTES, "little")
            strings += element
        return strings
    held = np.fromiter(elements, _HELD_IN.get(field, dtype), len(elements))
    packed = held.astype(dtype, copy=False)
    if field in _HELD_IN and not np.array_equal(held, packed):
        outside = held[held != packed][0]
        raise InvalidInput(
            f"tensor {name} has the element {outside}, which is out of the range of {tensor.datatype}",
            tensor=name[1:-1],
            got=int(outside),
        )
    return packed.view(np.uint8).data


def _strings(data: memoryview) -> Iterable[bytes]:
    """Yield the elements of BYTES in binary form, which our own server has written."""
    at = 0
    while at < len(data):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(data[at:start], "little")
        yield bytes(data[start:at])


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of parameters; one without a value is left out."""
    if len(parameters) > _MOST_PARAMETERS:
        raise InvalidInput(f'"parameters" has {len(parameters)} members; it takes {_MOST_PARAMETERS}')
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(parameter, kind)
    return found
