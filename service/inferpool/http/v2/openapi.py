"""The infer routes of `/v2` in the OpenAPI document."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from inferpool.http.media_types import JSON_TYPE, OCTET_STREAM
from inferpool.http.openapi_parts import (
    ANSWER_HEADERS,
    BINARY,
    REQUEST_HEADERS,
    Document,
    element_schema,
    error_references,
    example_inputs,
    input_schema,
    input_sets,
    minimum_size,
    nested_example,
    path_parameter,
    sample_inputs,
)
from inferpool.repository.catalog import VersionView
from inferpool.tensors import ANY, DTYPES, TensorSpec

_LENGTH: Final = "Inference-Header-Content-Length"


def infer_paths(views: list[VersionView]) -> Document:
    """The path items of infer: for any model and version, and one for each ready model."""
    model = path_parameter("model", "The model's name.")
    version = path_parameter("version", "A number or a label.")
    paths = {
        "/v2/models/{model}/infer": _path("v2_infer", "Infer with a model's default version", [model], None),
        "/v2/models/{model}/versions/{version}/infer": _path(
            "v2_infer_version", "Infer with a version, by number or label", [model, version], None
        ),
    }
    for view in views:
        name = view.key.model
        path = f"/v2/models/{quote(name, safe='')}/infer"
        paths[path] = _path(f"v2_infer_{name}", f"Infer with {name}", [], view)
    return paths


def _path(name: str, summary: str, parameters: list[Document], view: VersionView | None) -> Document:
    return {
        "post": {
            "operationId": name,
            "tags": ["v2"],
            "summary": summary,
            "parameters": [*parameters, *REQUEST_HEADERS, _LENGTH_PARAMETER],
            "requestBody": {"required": True, "content": _content(view)},
            "responses": {
                "200": {
                    "description": "The model's outputs; binary if the request asks for binary.",
                    "headers": {**ANSWER_HEADERS, _LENGTH: _LENGTH_HEADER},
                    "content": {JSON_TYPE: {"schema": _ANSWER}, OCTET_STREAM: {"schema": BINARY}},
                },
                **error_references("Error"),
            },
        }
    }


def _content(view: VersionView | None) -> Document:
    binary = {OCTET_STREAM: {"schema": BINARY}}
    if view is None:
        return {JSON_TYPE: {"schema": _request(_list(_input(None, None)), _list(_output(None)))}, **binary}
    assert view.signature is not None  # only ready versions are shown
    sets = [_inputs(view, together) for together in input_sets(view, view.signature.inputs)]
    inputs = {"anyOf": sets} if len(sets) > 1 else sets[0]
    outputs = {
        **_list(_output(list(view.signature.outputs_by_name))),
        "maxItems": len(view.signature.outputs),
    }
    json: Document = {"schema": _request(inputs, outputs)}
    given = _sample(view)
    shapes = example_inputs(view)
    if given is None and shapes is not None:
        given = [
            {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": shape,
                "data": nested_example(spec, shape),
            }
            for spec, shape in shapes
        ]
    if given is not None:
        json["examples"] = {view.key.model: {"value": {"inputs": given}}}
    return {JSON_TYPE: json, **binary}


def _sample(view: VersionView) -> list[Document] | None:
    """The inputs of a golden sample; None without one that names its inputs."""
    assert view.signature is not None  # only ready versions are shown
    inputs = sample_inputs(view)
    if not isinstance(inputs, dict) or not inputs.keys() <= view.signature.inputs_by_name.keys():
        return None
    return [
        {
            "name": name,
            "datatype": view.signature.inputs_by_name[name].datatype,
            "shape": _nested_shape(data),
            "data": data,
        }
        for name, data in inputs.items()
    ]


def _nested_shape(data: Any) -> list[int]:
    """The shape of nested lists, which were checked when the version was loaded."""
    shape = []
    while isinstance(data, list):
        shape.append(len(data))
        if not data:
            break
        data = data[0]
    return shape


def _inputs(view: VersionView, specs: list[TensorSpec]) -> Document:
    """The schema of a list with the inputs `specs` in any order."""
    return {
        "type": "array",
        **({"items": {"anyOf": [_input(view, spec) for spec in specs]}} if specs else {}),
        "minItems": sum(not spec.optional for spec in specs),
        "maxItems": len(specs),
    }


def _list(items: Document) -> Document:
    return {"type": "array", "items": items}


def _request(inputs: Document, outputs: Document) -> Document:
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"], "description": "Returned in the response."},
            "inputs": inputs,
            "outputs": {
                **outputs,
                "type": ["array", "null"],
                "description": "The outputs to return; by default all.",
            },
            "parameters": {
                "type": ["object", "null"],
                "properties": {
                    "timeout": {
                        "type": ["integer", "null"],
                        "minimum": 0,
                        "description": "Microseconds; 0 means no timeout.",
                    },
                    "priority": {
                        "type": ["integer", "null"],
                        "minimum": 0,
                        "description": "1 is the highest; 0 means the default.",
                    },
                    "binary_data_output": {"type": ["boolean", "null"]},
                },
            },
        },
    }


def _input(view: VersionView | None, spec: TensorSpec | None) -> Document:
    """The schema of a tensor in JSON, whose `data` is flat or nested and fills `shape`."""
    shape: Document = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    data: Document = {"type": ["array", "number", "string", "boolean"]}
    if view is not None and spec is not None:
        minimum = minimum_size(view, spec)
        flat = {**_list(element_schema(spec.datatype)), "minItems": minimum}
        data = {"anyOf": [flat, input_schema(view, spec)]}
        if spec.shape is not None:
            any_size = {"type": "integer", "minimum": minimum}
            sizes = [any_size if size == ANY else {"const": size} for size in spec.shape]
            shape = {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "maxItems": len(sizes)}
    return {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": {"type": "string"} if spec is None else {"const": spec.name},
            "datatype": {"enum": list(DTYPES)} if spec is None else {"const": spec.datatype},
            "shape": shape,
            "data": data,
        },
    }


def _output(names: list[str] | None) -> Document:
    return {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", **({} if names is None else {"enum": names})},
            "parameters": {
                "type": ["object", "null"],
                "properties": {
                    "binary_data": {"type": ["boolean", "null"]},
                    "classification": {
                        "type": ["integer", "null"],
                        "minimum": 0,
                        "description": "Return this many best classes instead of the tensor; numeric only.",
                    },
                },
            },
        },
    }


_LENGTH_PARAMETER: Final[Document] = {
    "name": _LENGTH,
    "in": "header",
    "description": (
        "Bytes of JSON at the start of the body, before the binary tensors; 0 for a body that is only the"
        " elements of the single input. Without this header the whole body is JSON."
    ),
    "schema": {"type": "integer", "minimum": 0},
}
_LENGTH_HEADER: Final[Document] = {
    "description": "Bytes of JSON at the start of a response with binary tensors.",
    "schema": {"type": "integer", "minimum": 1},
}
_ANSWER: Final[Document] = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape", "data"],
                "properties": {
                    "name": {"type": "string"},
                    "datatype": {"enum": list(DTYPES)},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "data": {"type": "array", "items": {"type": ["number", "string", "boolean", "null"]}},
                    "parameters": {"type": "object"},
                },
            },
        },
    },
}
