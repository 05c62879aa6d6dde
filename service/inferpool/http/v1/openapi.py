"""The predict routes of `/v1` in the OpenAPI document."""

from __future__ import annotations

from typing import Final

from inferpool.http.media_types import JSON_TYPE
from inferpool.http.openapi_parts import (
    ANSWER_HEADERS,
    REQUEST_HEADERS,
    Document,
    error_references,
    path_parameter,
)

_VALUES: Final = "A row of the model's only input, or an object with a value for each input."
_REQUEST: Final[Document] = {
    "type": "object",
    "required": ["instances"],
    "properties": {
        "instances": {"type": "array", "description": _VALUES},
        "signature_name": {"type": ["string", "null"], "description": "Not used."},
        "parameters": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {
                "timeout_ms": {"type": ["number", "null"], "exclusiveMinimum": 0},
                "priority": {"type": ["integer", "null"], "minimum": 0},
            },
        },
    },
    "additionalProperties": False,
}
_ANSWER: Final[Document] = {
    "type": "object",
    "properties": {
        "predictions": {"description": "A row of the only output, or an object, for each instance."}
    },
}


def v1_paths() -> Document:
    """The path items of predict, for any model and version."""
    model = path_parameter("model", "The model's name.")
    version = path_parameter("version", "A number or a label.")
    return {
        "/v1/models/{model}:predict": _path("v1_predict", "Predict with a model's default version", [model]),
        "/v1/models/{model}/versions/{version}:predict": _path(
            "v1_predict_version", "Predict with a version, by number or label", [model, version]
        ),
    }


def _path(name: str, summary: str, parameters: list[Document]) -> Document:
    return {
        "post": {
            "operationId": name,
            "tags": ["v1"],
            "summary": summary,
            "parameters": [*parameters, *REQUEST_HEADERS],
            "requestBody": {"required": True, "content": {JSON_TYPE: {"schema": _REQUEST}}},
            "responses": {
                "200": {
                    "description": "A prediction for each instance.",
                    "headers": ANSWER_HEADERS,
                    "content": {JSON_TYPE: {"schema": _ANSWER}},
                },
                **error_references("Error"),
            },
        }
    }
