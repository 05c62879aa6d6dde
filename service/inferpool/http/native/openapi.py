"""The predict routes of `/predict` in the OpenAPI document.

`/predict` and `/predict/{model}` take any model. Each ready model also has a path of its own, whose schema
says every dimension that the model takes.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from inferpool.http.media_types import FORM, JSON_TYPE, NPY, NPZ
from inferpool.http.openapi_parts import (
    ANSWER_HEADERS,
    BINARY,
    REQUEST_HEADERS,
    Document,
    error_references,
    example_inputs,
    input_schema,
    input_sets,
    nested_example,
    path_parameter,
    sample_inputs,
)
from inferpool.repository.catalog import VersionView
from inferpool.tensors import TensorSpec


def predict_paths(views: list[VersionView]) -> Document:
    """The path items of predict: for any model and version, and one for each ready model."""
    model = path_parameter("model", "The model's name.")
    version = path_parameter("version", "A number or a label.")
    pictures = sorted({kind for view in views if view.image for kind in view.image.media_types})
    texts = sorted({kind for view in views if view.text for kind in view.text.media_types})
    files = {
        **{kind: {"schema": BINARY} for kind in (NPY, NPZ, *pictures)},
        **{kind: {"schema": _SENTENCE} for kind in texts},
    }
    any_form = {FORM: {"schema": {"type": "object", "description": _FORM}}}
    anything = {"description": "Nested lists by input name, or those of the single input; rows come first."}
    any_model: Document = {JSON_TYPE: {"schema": _request(anything, None)}, **files, **any_form}
    paths = {
        "/predict": _path("predict", "Predict, with the model named in the body", [], _named(views)),
        "/predict/{model}": _path(
            "predict_model", "Predict with a model's default version", [model], any_model
        ),
        "/predict/{model}/{version}": _path(
            "predict_version", "Predict with a version, by number or label", [model, version], any_model
        ),
    }
    for view in views:
        name = view.key.model
        path = f"/predict/{quote(name, safe='')}"
        paths[path] = _path(f"predict_model_{name}", f"Predict with {name}", [], _content(view))
    return paths


def _path(name: str, summary: str, parameters: list[Document], content: Document) -> Document:
    return {
        "post": {
            "operationId": name,
            "tags": ["predict"],
            "summary": summary,
            "parameters": [*parameters, *REQUEST_HEADERS],
            "requestBody": {"required": True, "content": content},
            "responses": {
                "200": {
                    "description": "The model's outputs, in the format that Accept asks for.",
                    "headers": ANSWER_HEADERS,
                    "content": {
                        JSON_TYPE: {"schema": _ANSWER},
                        NPY: {"schema": BINARY},
                        NPZ: {"schema": BINARY},
                    },
                },
                **error_references("Problem"),
            },
        }
    }


def _named(views: list[VersionView]) -> Document:
    """The bodies of `/predict`: JSON that names a model, and all formats if only one model is served."""
    requests = []
    examples = {}
    for view in views:
        request = _request(_inputs(view), view)
        request["properties"]["model"] = {"const": view.key.model}
        request["required"] = ["inputs"] if len(views) == 1 else ["model", "inputs"]
        requests.append(request)
        example = _example(view)
        if example is not None:
            examples[view.key.model] = {"value": {"model": view.key.model, **example}}
    schema = {"oneOf": requests} if requests else _request({}, None)
    other_formats = (
        {kind: body for kind, body in _content(views[0]).items() if kind != JSON_TYPE}
        if len(views) == 1
        else {}
    )
    return {JSON_TYPE: {"schema": schema, **({"examples": examples} if examples else {})}, **other_formats}


def _content(view: VersionView) -> Document:
    """The request bodies of a version by media type."""
    assert view.signature is not None  # only ready versions are shown
    example = _example(view)
    content: Document = {
        JSON_TYPE: {
            "schema": _request(_inputs(view), view),
            **({"examples": {view.key.model: {"value": example}}} if example is not None else {}),
        }
    }
    if view.signature.single_input is not None:
        content[NPY] = {"schema": BINARY}
    content[NPZ] = {"schema": BINARY}
    forms = [_form(specs) for specs in input_sets(view, view.signature.inputs)]
    content[FORM] = {"schema": _any(forms)}
    for kind in view.image.media_types if view.image is not None else ():
        content[kind] = {"schema": BINARY}
    for kind in view.text.media_types if view.text is not None else ():
        content[kind] = {"schema": _SENTENCE}
    return content


def _inputs(view: VersionView) -> Document:
    """The schema of `inputs` in a version's JSON body."""
    assert view.signature is not None  # only ready versions are shown
    single = view.signature.single_input
    forms = [
        _by_name(together, {spec.name: input_schema(view, spec) for spec in together})
        for together in input_sets(view, view.signature.inputs)
    ]
    return _any([*forms, input_schema(view, single)] if single is not None else forms)


def _by_name(specs: list[TensorSpec], schemas: Document) -> Document:
    """The schema of an object with the inputs `specs`, each with its schema in `schemas`."""
    return {
        "type": "object",
        "required": [spec.name for spec in specs if not spec.optional],
        "additionalProperties": False,
        "properties": schemas,
    }


def _any(forms: list[Document]) -> Document:
    return {"anyOf": forms} if len(forms) > 1 else forms[0]


def _example(view: VersionView) -> Document | None:
    sample = sample_inputs(view)
    if sample is not None:
        return {"inputs": sample}
    shapes = example_inputs(view)
    if shapes is None:
        return None
    return {"inputs": {spec.name: nested_example(spec, shape) for spec, shape in shapes}}


def _form(specs: list[TensorSpec]) -> Document:
    return {**_by_name(specs, {spec.name: BINARY for spec in specs}), "description": _FORM}


def _request(inputs: Document, view: VersionView | None) -> Document:
    """The schema of a JSON body with these `inputs`, for a version or, without `view`, for any."""
    outputs: Document = {"type": "string"}
    if view is not None and view.signature is not None:
        outputs["enum"] = list(view.signature.outputs_by_name)
    return {
        "type": "object",
        "required": ["inputs"],
        "additionalProperties": False,
        "properties": {
            "model": {
                "type": ["string", "null"] if view is None else "null",
                "description": "The model's name, if the path does not contain it.",
            },
            "version": {"type": ["string", "integer", "null"], "description": "A number or a label."},
            "id": {"type": ["string", "null"], "description": "Returned in the response."},
            "inputs": inputs,
            "outputs": {
                "type": ["array", "null"],
                "items": outputs,
                "description": "Names of the outputs to return; by default all.",
            },
            "parameters": {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {
                    "timeout_ms": {"type": ["number", "null"], "exclusiveMinimum": 0},
                    "priority": {
                        "type": ["integer", "null"],
                        "minimum": 0,
                        "description": "1 is the highest; 0 means the default.",
                    },
                },
            },
        },
    }


_FORM: Final = "An npy file per input, or a picture or a sentence for a model that takes one."
_SENTENCE: Final[Document] = {"type": "string", "description": "One sentence, in UTF-8."}
_ANSWER: Final[Document] = {
    "type": "object",
    "required": ["model", "version", "id", "outputs"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {
            "type": "object",
            "description": "Nested lists by output name; the first dimension is rows.",
        },
        "predictions": {
            "type": "array",
            "description": "For a model with labels: a list per row of its best labels, best first.",
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
            "type": "array",
            "items": {"type": "string"},
            "description": "Names of outputs with numbers that JSON cannot represent, which are null.",
        },
    },
}
