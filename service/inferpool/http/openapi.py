"""The OpenAPI document of the whole API: FastAPI's routes, and the predict routes, which it does not know."""

from __future__ import annotations

from typing import Final

from inferpool.http.native.api import NATIVE_API
from inferpool.http.native.openapi import predict_paths
from inferpool.http.native.schemas import Problem
from inferpool.http.openai.api import TEXT_APIS
from inferpool.http.openai.openapi import OPENAI_ERROR, text_paths
from inferpool.http.openapi_parts import Document, error_responses
from inferpool.http.platforms.openapi import platform_paths
from inferpool.http.predict.api import InferenceApi
from inferpool.http.v1.openapi import v1_paths
from inferpool.http.v2.api import V2_API
from inferpool.http.v2.openapi import infer_paths
from inferpool.http.v2.schemas import Error
from inferpool.repository.catalog import Catalog

_FRAMEWORK_SCHEMAS: Final = ("HTTPValidationError", "ValidationError")
"""FastAPI's own errors, which this server never answers."""


def complete(document: Document, catalog: Catalog) -> Document:
    """FastAPI's `document` with the predict routes of every ready model and this server's errors."""
    views = [model.default for model in catalog.models().values() if model.default is not None]
    paths = {path: _without_framework_errors(item) for path, item in document["paths"].items()}
    components = document.get("components", {})
    kept = {
        name: schema
        for name, schema in components.get("schemas", {}).items()
        if name not in _FRAMEWORK_SCHEMAS
    }
    schemas = {
        **kept,
        "Problem": Problem.model_json_schema(),
        "Error": Error.model_json_schema(),
        "OpenAiError": OPENAI_ERROR,
    }
    responses = {}
    apis: tuple[tuple[str, InferenceApi], ...] = (
        ("Problem", NATIVE_API),
        ("Error", V2_API),
        ("OpenAiError", TEXT_APIS[0]),
    )
    for name, api in apis:
        errors = error_responses(name, api.problem_type.decode())
        responses.update({f"{name}{status}": response for status, response in errors.items()})
    return {
        **document,
        "paths": {
            **predict_paths(views),
            **paths,
            **infer_paths(views),
            **v1_paths(),
            **text_paths(),
            **platform_paths(),
        },
        "components": {**components, "schemas": schemas, "responses": responses},
    }


def _without_framework_errors(item: Document) -> Document:
    """A path item without the 422 that FastAPI documents for every route with a parameter."""
    return {
        method: {
            **operation,
            "responses": {
                status: response
                for status, response in operation["responses"].items()
                if "HTTPValidationError" not in str(response)
            },
        }
        for method, operation in item.items()
    }
