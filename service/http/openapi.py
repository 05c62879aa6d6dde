"""What the OpenAPI document says of the predict routes, whose lane the framework does not see."""

from __future__ import annotations

from typing import Any

from service.http.problems import PROBLEM_TYPE, STATUSES
from service.repository.catalog import Catalog, VersionView
from service.tensors import ANY, TensorSpec

Document = dict[str, Any]

_EXAMPLE_VALUES = {"BOOL": False, "BYTES": "text"}
"""What an element of an example is; every other datatype takes a 0."""


def predict_paths(catalog: Catalog) -> Document:
    """The path items of `/predict`, `/predict/{model}` and `/predict/{model}/{version}`."""
    ready = [model.default for model in catalog.models().values() if model.default is not None]
    return {
        "/predict": {"post": _operation(ready, [], "predict", "Predict, with the model named in the body")},
        "/predict/{model}": {
            "post": _operation(ready, ["model"], "predict_model", "Predict with a model's default version")
        },
        "/predict/{model}/{version}": {
            "post": _operation(
                ready, ["model", "version"], "predict_version", "Predict with a version, by number or label"
            )
        },
    }


def _operation(ready: list[VersionView], parameters: list[str], name: str, summary: str) -> Document:
    named_in_body = "model" not in parameters
    return {
        "operationId": name,
        "tags": ["predict"],
        "summary": summary,
        "parameters": [
            *(
                {"name": part, "in": "path", "required": True, "schema": {"type": "string"}}
                for part in parameters
            ),
            {
                "name": "X-Request-Id",
                "in": "header",
                "description": "Comes back with the answer; a new one is made where it is missing.",
                "schema": {"type": "string", "maxLength": 128, "pattern": r"^[\x21-\x7e]+$"},
            },
            {
                "name": "X-Timeout-Ms",
                "in": "header",
                "description": "Answer 504 rather than later than this.",
                "schema": {"type": "number", "exclusiveMinimum": 0},
            },
        ],
        "requestBody": {"required": True, "content": _request_content(ready, named_in_body)},
        "responses": {
            "200": {
                "description": "The model's answer.",
                "headers": _ANSWER_HEADERS,
                "content": {
                    "application/json": {"schema": _ANSWER},
                    "application/x-npy": {"schema": _BINARY},
                    "application/x-npz": {"schema": _BINARY},
                },
            },
            **error_responses(),
        },
    }


def error_responses() -> Document:
    """One response a status of the error table, with the codes that it may carry."""
    codes: dict[int, list[str]] = {}
    for code, status in STATUSES.items():
        codes.setdefault(status, []).append(code)
    return {
        str(status): {
            "description": " or ".join(f"`{code}`" for code in listed),
            "content": {PROBLEM_TYPE.decode(): {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, listed in sorted(codes.items())
    }


_BINARY: Document = {"type": "string", "format": "binary"}
_NAMES: Document = {"type": "array", "items": {"type": "string"}}
_ANSWER_HEADERS: Document = {
    "X-Request-Id": {"schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds: `queue;dur=…, compute;dur=…, total;dur=…`",
        "schema": {"type": "string"},
    },
}
_ANSWER: Document = {
    "type": "object",
    "required": ["model", "version", "id", "outputs"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "object", "description": "Nested lists by output; the first dimension is rows."},
        "predictions": {
            "type": "array",
            "description": "For a model with labels: for each row its best labels, best first.",
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["label", "score"],
                    "properties": {"label": {"type": "string"}, "score": {"type": ["number", "null"]}},
                },
            },
        },
        "non_finite": {
            **_NAMES,
            "description": "Outputs with numbers that JSON cannot hold: null in their place.",
        },
    },
}
_REQUEST: Document = {
    "type": "object",
    "required": ["inputs"],
    "additionalProperties": False,
    "properties": {
        "model": {
            "type": ["string", "null"],
            "description": "The model's name; left out when one model is served or the path names it.",
        },
        "version": {"type": ["string", "integer", "null"], "description": "A number or a label."},
        "id": {"type": ["string", "null"], "description": "Comes back in the answer."},
        "inputs": {
            "description": "Nested lists by input, rows first; or the nested list itself, for a single input."
        },
        "outputs": {
            **_NAMES,
            "type": ["array", "null"],
            "description": "The outputs wanted; all by default.",
        },
        "parameters": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {
                "timeout_ms": {"type": ["number", "null"], "exclusiveMinimum": 0},
                "priority": {
                    "type": ["integer", "null"],
                    "minimum": 0,
                    "description": "1 is the highest; 0 is the default.",
                },
            },
        },
    },
}


def _request_content(ready: list[VersionView], named_in_body: bool) -> Document:
    examples = {
        view.key.model: {
            "value": {**({"model": view.key.model} if named_in_body else {}), "inputs": _example(view)}
        }
        for view in ready
    }
    pictures = sorted({kind for view in ready if view.image for kind in view.image.media_types})
    content: Document = {
        "application/json": {"schema": _REQUEST, **({"examples": examples} if examples else {})}
    }
    for kind in ("application/x-npy", "application/x-npz", *pictures):
        content[kind] = {"schema": _BINARY}
    return content


def _example(view: VersionView) -> Document:
    assert view.signature is not None  # only ready versions are shown
    return {
        spec.name: _nested(spec, list(spec.shape or ()))
        for spec in view.signature.inputs
        if not spec.optional
    }


def _nested(spec: TensorSpec, shape: list[int]) -> Any:
    if not shape:
        return _EXAMPLE_VALUES.get(spec.datatype, 0)
    return [_nested(spec, shape[1:]) for _ in range(1 if shape[0] == ANY else shape[0])]
