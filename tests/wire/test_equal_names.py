"""If a name comes twice in an object, the last one counts: in the bodies of every API, at any depth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferpool.errors import RequestError
from inferpool.http.openai.requests import EmbeddingsRequest, RerankRequest, ScoreRequest
from inferpool.tensors import ANY
from inferpool.wire.json_bodies import read_object
from inferpool.wire.native_json import parse_request
from inferpool.wire.v1_request import parse_either, parse_instances
from inferpool.wire.v2_request import parse_infer

from tests.wire.conftest import WAYS, any_shape, bits, reading_by, takes

Read = Callable[[bytes], Any]
ROWS = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2.5]}
"""An input in the form of `/v2`."""


def fields_of(request: object) -> dict[str, Any]:
    names = (name for kind in type(request).__mro__ for name in getattr(kind, "__slots__", ()))
    return {
        name: getattr(request, name)
        for name in [*names, *getattr(request, "__dict__", ())]
        if not name.startswith("_")
    }


def tensors_by(parse: Callable[..., Any], rank: int, *arguments: None) -> Read:
    """Return a reader of the fields that `parse` finds, and of the tensors for a model of one input."""
    signature = any_shape("FP32", rank) if rank else takes("FP32", ANY)

    def read(body: bytes) -> Any:
        request = parse(body, *arguments)
        fields = fields_of(request)
        return fields, {name: bits(tensor) for name, tensor in request.tensors(signature).items()}

    return read


def framed(body: bytes) -> Any:
    """Return what is read from a header that announces tensors in binary form behind it."""
    request = parse_infer(body + b"\0\0\x80\x3f" * 2, len(body))
    return fields_of(request), {
        name: bits(tensor) for name, tensor in request.tensors(takes("FP32", ANY)).items()
    }


def texts(kind: Callable[[dict[str, Any]], Any]) -> Read:
    """Return a reader of what the routes of texts find in a body."""
    return lambda body: {
        name: value
        for name, value in vars(kind(read_object(body, "{}"))).items()
        if isinstance(value, (str, int, list, tuple, type(None)))
    }


BODIES: Mapping[str, tuple[Read, Any]] = {
    "native": (
        tensors_by(parse_request, 1),
        {"inputs": {"x": [1, 2]}, "id": "a", "parameters": {"timeout_ms": 5, "priority": 2}},
    ),
    "v2": (
        tensors_by(parse_infer, 0, None),
        {
            "id": "a",
            "parameters": {"timeout": 5, "priority": 2},
            "inputs": [ROWS],
            "outputs": [{"name": "y", "parameters": {"classification": 3}}],
        },
    ),
    "v2 in binary form": (
        framed,
        {
            "id": "a",
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
            ],
        },
    ),
    "v1 instances": (
        tensors_by(parse_instances, 1),
        {"instances": [{"x": 1}, {"x": 2.5}], "signature_name": "s", "parameters": {"priority": 2}},
    ),
    "v1 inputs": (tensors_by(parse_instances, 1), {"inputs": {"x": [1, 2]}, "signature_name": "s"}),
    "v1 or native": (tensors_by(parse_either, 1), {"instances": [1, 2]}),
    "embeddings": (texts(EmbeddingsRequest), {"model": "m", "input": ["a", "b"], "dimensions": 4}),
    "rerank": (texts(RerankRequest), {"model": "m", "query": "q", "documents": ["a", "b"], "top_n": 1}),
    "score": (texts(ScoreRequest), {"model": "m", "text_1": "q", "text_2": ["a", "b"]}),
}
"""For each kind of body: how it is read, and a body that is right."""

DECOYS = st.sampled_from(["1", "[1]", "[3, 4.5]", '"a"', "null", "[]", "{}", '[{"x": [9], "x": [8]}]'])
"""Values of members whose name comes again."""


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> str:
    """`value` in JSON, whose objects have members before those of the same name, and sometimes behind."""
    if isinstance(value, list):
        return "[" + ", ".join([draw(spelled(each)) for each in value]) + "]"
    if not isinstance(value, dict):
        return json.dumps(value)
    members = []
    for name, member in value.items():
        before = [(name, decoy) for decoy in draw(st.lists(DECOYS, max_size=2))]
        members += [*before, (name, draw(spelled(member)))]
    if members and draw(st.integers(0, 9)) == 0:
        members.append((draw(st.sampled_from(members))[0], draw(DECOYS)))
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in members) + "}"


def outcome(read: Read, body: str, way: str) -> Any:
    """What becomes of a body, or the error."""
    try:
        with reading_by(way):
            return read(body.encode())
    except RequestError as error:
        return type(error), error.detail, error.members


@pytest.mark.parametrize("kind", BODIES)
@settings(max_examples=25)
@given(data=st.data())
def test_the_last_of_equal_names_counts(kind: str, data: st.DataObject) -> None:
    """The body means what Python's `json` reads, whichever module reads it."""
    read, right = BODIES[kind]
    body = data.draw(spelled(right))
    expected = outcome(read, json.dumps(json.loads(body)), "orjson")
    for way in WAYS:
        assert outcome(read, body, way) == expected


@pytest.mark.parametrize("kind", BODIES)
def test_the_bodies_are_right(kind: str) -> None:
    read, right = BODIES[kind]
    for way in WAYS:
        with reading_by(way):
            read(json.dumps(right).encode())
