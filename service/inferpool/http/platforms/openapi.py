"""The paths of predictions that platforms call, in the OpenAPI document."""

from __future__ import annotations

from typing import Final

from inferpool.http.media_types import CSV, JSON_LINES, JSON_TYPE
from inferpool.http.openapi_parts import (
    ANSWER_HEADERS,
    REQUEST_HEADERS,
    Document,
    error_references,
    path_parameter,
)

_ATTRIBUTES: Final[Document] = {
    "name": "X-Amzn-SageMaker-Custom-Attributes",
    "in": "header",
    "description": "`model=NAME,version=VERSION` if the server has several models.",
    "schema": {"type": "string"},
}
_REQUEST: Final[Document] = {
    "description": "`instances` as `/v1` takes them, or a body of `/predict`; also CSV, JSON lines, arrays,"
    " pictures and sentences by their media types.",
    "type": "object",
    "anyOf": [
        {"required": ["instances"], "properties": {"instances": {"type": "array"}}},
        {"required": ["inputs"], "properties": {"model": {"type": "string"}}},
    ],
}
_ANSWER: Final[Document] = {
    "type": "object",
    "description": "A native body has a native answer, every other one `predictions`.",
}


def platform_paths() -> Document:
    """The path items of SageMaker, Azure ML and Vertex AI."""
    endpoint = path_parameter("endpoint", "Not used.")
    deployed = path_parameter("deployed", "Not used.")
    return {
        "/invocations": _path("invocations", "Predict, as SageMaker asks", [_ATTRIBUTES]),
        "/score": _path("azure_score", "Predict, as Azure ML asks", []),
        "/v1/endpoints/{endpoint}/deployedModels/{deployed}:predict": _path(
            "vertex_predict", "Predict, as Vertex AI asks", [endpoint, deployed]
        ),
    }


def _path(name: str, summary: str, parameters: list[Document]) -> Document:
    answers: Document = {JSON_TYPE: {"schema": _ANSWER}}
    for kind in (CSV, JSON_LINES):
        answers[kind] = {"schema": {"type": "string"}}
    return {
        "post": {
            "operationId": name,
            "tags": ["platforms"],
            "summary": summary,
            "parameters": [*parameters, *REQUEST_HEADERS],
            "requestBody": {"required": True, "content": {JSON_TYPE: {"schema": _REQUEST}}},
            "responses": {
                "200": {"description": "The answer.", "headers": ANSWER_HEADERS, "content": answers},
                **error_references("Problem"),
            },
        }
    }
