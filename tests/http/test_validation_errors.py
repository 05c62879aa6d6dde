"""What FastAPI finds wrong with a request reaches the client with the field and what came."""

from __future__ import annotations

from typing import Any

import pytest
from inferpool.errors import InferpoolError

NUMBER = "Input should be a valid integer"


def fault(
    kind: str, *location: int | str, message: str = "", came: Any = None, **context: Any
) -> dict[str, Any]:
    return {"type": kind, "loc": location, "msg": message, "input": came, "ctx": context}


def refusal_of(*found: dict[str, Any]) -> InferpoolError:
    from fastapi.exceptions import RequestValidationError
    from inferpool.http import validation_errors

    return validation_errors.refusal_of(RequestValidationError(found))


@pytest.mark.parametrize(
    ("found", "code", "members", "said"),
    [
        (
            fault("json_invalid", "body", 7, error="Expecting value"),
            "malformed_body",
            {"position": 7},
            "Expecting value at character 7",
        ),
        (fault("missing", "body"), "malformed_body", {"position": 0}, "empty"),
        (fault("model_attributes_type", "body", came=[1]), "malformed_body", {}, "the body is a list"),
        (
            fault("model_attributes_type", "body", came=b"a=1"),
            "unsupported_media_type",
            {"expected": ["application/json"]},
            "application/json",
        ),
        (
            fault("int_type", "body", "canary", "version", message=NUMBER, came="2"),
            "invalid_input",
            {"field": "canary.version"},
            '"canary.version" is "2"; input should be a valid integer',
        ),
        (fault("missing", "body", "share"), "invalid_input", {"field": "share"}, '"share" is missing'),
        (fault("extra_forbidden", "query", "x"), "invalid_input", {"field": "x"}, '"x" is unknown'),
    ],
)
def test_a_fault_is_named(found: dict[str, Any], code: str, members: dict[str, Any], said: str) -> None:
    error = refusal_of(found)
    assert error.code == code
    assert members.items() <= error.members.items()
    assert said in error.detail


def test_every_fault_is_named_and_the_first_is_the_field() -> None:
    error = refusal_of(fault("missing", "body", "a"), fault("missing", "body", "b"))
    assert error.detail == '"a" is missing; "b" is missing'
    assert error.members["field"] == "a"


def test_a_long_value_is_cut_off() -> None:
    error = refusal_of(fault("int_type", "query", "seed", came="1" * 10_000))
    assert len(error.detail) < 200
