"""What the OpenAPI document says of every predict route: tensors as JSON Schema, headers, errors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Final

import numpy as np

from inferpool.http.problems import STATUSES
from inferpool.repository.catalog import VersionView
from inferpool.tensors import ANY, DTYPES, TensorSpec

Document = dict[str, Any]

BINARY: Final[Document] = {"type": "string", "format": "binary"}
_EXAMPLE_VALUES: Final = {"BOOL": False, "BYTES": "text"}
"""What an element of an example is; every other datatype takes a 0."""
_MAX_EXAMPLE_ELEMENTS: Final = 1024
"""Larger tensors would make the document mostly zeros."""


def element_schema(datatype: str) -> Document:
    """One element of a tensor."""
    if datatype == "BOOL":
        return {"type": "boolean"}
    if datatype == "BYTES":
        return {"type": "string"}
    dtype = DTYPES[datatype]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}
    largest = float(np.finfo(dtype).max)
    return {"type": "number", "minimum": -largest, "maximum": largest}


def nested_schema(spec: TensorSpec) -> Document:
    """A tensor as lists in lists, one a dimension; only the innermost may be empty, or it would not show."""
    if spec.shape is None:
        return {"description": f"{spec.datatype}, of any number of dimensions"}
    schema = element_schema(spec.datatype)
    for depth, size in reversed(list(enumerate(spec.shape, 1))):
        schema = {"type": "array", "items": schema}
        if size != ANY:
            schema |= {"minItems": size, "maxItems": size}
        elif depth < len(spec.shape):
            schema["minItems"] = 1
    return schema


def least_size(view: VersionView, spec: TensorSpec) -> int:
    """The least that a dimension of any size may be: there is a sentence at least, but no row need be."""
    return int(view.text is not None and spec.name == view.text.input)


def input_schema(view: VersionView, spec: TensorSpec) -> Document:
    """An input of a version as lists in lists."""
    least = least_size(view, spec)
    return {**nested_schema(spec), **({"minItems": least} if least else {})}


def input_sets(view: VersionView, specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Those of `specs` that come together: the model's own, and the one, if any, in place of them all."""
    assert view.signature is not None  # only ready versions are shown
    substitute = view.signature.substitute_input
    own = [spec for spec in specs if spec.name != substitute]
    return [own, *([spec] for spec in specs if spec.name == substitute)]


def in_json(view: VersionView) -> list[TensorSpec] | None:
    """The inputs that JSON can carry; None where it cannot carry one that the version needs."""
    assert view.signature is not None  # only ready versions are shown
    if any(spec.datatype == "BF16" and not spec.optional for spec in view.signature.inputs):
        return None
    return [spec for spec in view.signature.inputs if spec.datatype != "BF16"]


def example_inputs(view: VersionView) -> list[tuple[TensorSpec, list[int]]] | None:
    """The inputs that the version needs, each with a shape it takes; None where that is too much to show."""
    assert view.signature is not None  # only ready versions are shown
    substitute = view.signature.substitute_input
    shapes = [
        (spec, [1 if size == ANY else size for size in spec.shape or ()])
        for spec in view.signature.inputs
        if (not spec.optional if substitute is None else spec.name == substitute)
    ]
    fits = in_json(view) is not None and sum(prod(shape) for _, shape in shapes) <= _MAX_EXAMPLE_ELEMENTS
    return shapes if fits else None


def nested_example(spec: TensorSpec, shape: list[int]) -> Any:
    """A tensor of `shape` as lists in lists."""
    if not shape:
        return _EXAMPLE_VALUES.get(spec.datatype, 0)
    return [nested_example(spec, shape[1:]) for _ in range(shape[0])]


def path_parameter(name: str, description: str) -> Document:
    """A part of the path that the caller fills in."""
    schema = {"type": "string"}
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}


def error_responses(schema: str, media_type: str) -> Document:
    """One response a status of the error table, with the codes that it may carry."""
    codes: dict[int, list[str]] = {}
    for code, status in STATUSES.items():
        codes.setdefault(status, []).append(code)
    return {
        str(status): {
            "description": " or ".join(f"`{code}`" for code in listed),
            "content": {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        }
        for status, listed in sorted(codes.items())
    }


def error_references(schema: str) -> Document:
    """The same responses, as they are named in the document's components."""
    return {
        str(status): {"$ref": f"#/components/responses/{schema}{status}"}
        for status in sorted(set(STATUSES.values()))
    }


REQUEST_HEADERS: Final[list[Document]] = [
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Comes back with the answer where it is 1 to 128 visible ASCII characters.",
        "schema": {"type": "string"},
    },
    {
        "name": "X-Timeout-Ms",
        "in": "header",
        "description": "Answer 504 rather than later than this.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
]
ANSWER_HEADERS: Final[Document] = {
    "X-Request-Id": {"schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds: `queue;dur=…, compute;dur=…, total;dur=…`",
        "schema": {"type": "string"},
    },
    "Content-Encoding": {
        "description": "`gzip`, where Accept-Encoding takes it and the answer shrinks.",
        "schema": {"type": "string"},
    },
}
