"""What FastAPI finds wrong with a request, as errors of this project, with the field and what came."""

from __future__ import annotations

from typing import Any, Final

from fastapi.exceptions import RequestValidationError

from inferpool.errors import InferpoolError, InvalidInput, MalformedBody, UnsupportedMediaType
from inferpool.http.media_types import JSON_TYPE
from inferpool.tensors import value_text

_WHOLE_BODY: Final = ("body",)


def refusal_of(error: RequestValidationError) -> InferpoolError:
    """Return the error that the client gets; its members name the first field that is wrong."""
    faults = error.errors()
    first = faults[0]
    kind, location = first["type"], tuple(first["loc"])
    if kind == "json_invalid":
        position, reason = location[-1], first.get("ctx", {}).get("error", "")
        return MalformedBody(f"the body is not JSON: {reason} at character {position}", position=position)
    if location == _WHOLE_BODY:
        return _wrong_body(kind, first["input"])
    return InvalidInput("; ".join(map(_described, faults)), field=_field(location))


def _wrong_body(kind: str, came: Any) -> InferpoolError:
    if kind == "missing":
        return MalformedBody(f"the body is empty; send a JSON object as {JSON_TYPE}", position=0)
    if isinstance(came, bytes):
        return UnsupportedMediaType(
            f"the body is not announced as JSON; send it with Content-Type: {JSON_TYPE}", expected=[JSON_TYPE]
        )
    return MalformedBody(f"the body is {value_text(came)}; send a JSON object")


def _field(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location[1:]))


def _described(fault: dict[str, Any]) -> str:
    field = value_text(_field(tuple(fault["loc"])))
    if fault["type"] == "missing":
        return f"{field} is missing"
    if fault["type"] == "extra_forbidden":
        return f"{field} is unknown"
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return f"{field} is {value_text(fault['input'])}; {message}"
