"""The parts of the OpenAPI document that all predict routes share: tensors, headers, errors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Final

import numpy as np
import orjson

from inferpool.http.problems import STATUSES
from inferpool.repository.catalog import VersionView
from inferpool.tensors import ANY, BF16_MAX, DTYPES, TensorSpec

Document = dict[str, Any]

BINARY: Final[Document] = {"type": "string", "format": "binary"}
_EXAMPLE_VALUES: Final = {"BOOL": False, "BYTES": "text"}
"""The element of an example by datatype; all other datatypes take 0."""
_MAX_EXAMPLE_ELEMENTS: Final = 1024
"""Larger examples are left out, because they would fill the document with zeros."""


_MAX_SAMPLE_CHARACTERS: Final = 4096
"""Longer samples are left out of the document for the same reason."""


def element_schema(datatype: str) -> Document:
    """The schema of one element of a tensor."""
    if datatype == "BOOL":
        return {"type": "boolean"}
    if datatype == "BYTES":
        return {"type": "string"}
    dtype = DTYPES[datatype]
    if datatype == "BF16":
        return {"type": ["number", "null"], "minimum": -BF16_MAX, "maximum": BF16_MAX}
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}
    largest = float(np.finfo(dtype).max)
    return {"type": ["number", "null"], "minimum": -largest, "maximum": largest}


def nested_schema(spec: TensorSpec) -> Document:
    """The schema of a tensor as nested lists. A list may be empty only if the shape is known without it."""
    if spec.shape is None:
        return {"description": f"{spec.datatype}, of any number of dimensions"}
    schema = element_schema(spec.datatype)
    for depth, size in reversed(list(enumerate(spec.shape, 1))):
        schema = {"type": "array", "items": schema}
        if size != ANY:
            schema |= {"minItems": size, "maxItems": size}
        elif 1 < depth < len(spec.shape) or ANY in spec.shape[depth:]:
            schema["minItems"] = 1
    return schema


def minimum_size(view: VersionView, spec: TensorSpec) -> int:
    """The smallest size of a dimension of any size: 1 for sentences, 0 for all other inputs."""
    return int(view.text is not None and spec.name == view.text.input)


def input_schema(view: VersionView, spec: TensorSpec) -> Document:
    """The schema of an input as nested lists."""
    minimum = minimum_size(view, spec)
    return {**nested_schema(spec), **({"minItems": minimum} if minimum else {})}


def input_sets(view: VersionView, specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Split `specs` into the sets that a request may send: the usual inputs, and the substitute, if any."""
    assert view.signature is not None  # only ready versions are shown
    substitute = view.signature.substitute_input
    own = [spec for spec in specs if spec.name != substitute]
    return [own, *([spec] for spec in specs if spec.name == substitute)]


def example_inputs(view: VersionView) -> list[tuple[TensorSpec, list[int]]] | None:
    """The required inputs, each with a valid shape; None if an example would be too large."""
    assert view.signature is not None  # only ready versions are shown
    substitute = view.signature.substitute_input
    shapes = [
        (spec, [1 if size == ANY else size for size in spec.shape or ()])
        for spec in view.signature.inputs
        if (not spec.optional if substitute is None else spec.name == substitute)
    ]
    fits = sum(prod(shape) for _, shape in shapes) <= _MAX_EXAMPLE_ELEMENTS
    return shapes if fits else None


def sample_inputs(view: VersionView) -> Any | None:
    """The inputs of the version's first golden sample that is small enough; None without one."""
    small = (sample for sample in view.samples if len(sample.inputs) <= _MAX_SAMPLE_CHARACTERS)
    sample = next(small, None)
    return None if sample is None else orjson.loads(sample.inputs)


def nested_example(spec: TensorSpec, shape: list[int]) -> Any:
    """An example tensor of `shape` as nested lists."""
    if not shape:
        return _EXAMPLE_VALUES.get(spec.datatype, 0)
    return [nested_example(spec, shape[1:]) for _ in range(shape[0])]


def path_parameter(name: str, description: str) -> Document:
    """The documentation of a path parameter."""
    schema = {"type": "string"}
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}


def error_responses(schema: str, media_type: str) -> Document:
    """One response per status of the error table, with its codes; `schema` is the name of its schema."""
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
    """References to the responses of `error_responses` in the components of the document."""
    return {
        str(status): {"$ref": f"#/components/responses/{schema}{status}"}
        for status in sorted(set(STATUSES.values()))
    }


REQUEST_HEADERS: Final[list[Document]] = [
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Returned with the response if it has 1 to 128 visible ASCII characters.",
        "schema": {"type": "string"},
    },
    {
        "name": "X-Timeout-Ms",
        "in": "header",
        "description": "Milliseconds after which the server answers 504.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
]
ANSWER_HEADERS: Final[Document] = {
    "X-Request-Id": {"schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds: `queue;dur=…, compute;dur=…, total;dur=…`",
        "schema": {"type": "string"},
    },
    "Cache-Status": {
        "description": "Of a model with a cache: `inferpool; hit`, `inferpool; fwd=miss`, or `inferpool;"
        " fwd=miss; collapsed` if the run of an equal request answered this one.",
        "schema": {"type": "string"},
    },
    "Content-Encoding": {
        "description": "`gzip`, if Accept-Encoding allows it and the response shrinks.",
        "schema": {"type": "string"},
    },
}
