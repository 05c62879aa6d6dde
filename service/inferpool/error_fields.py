"""Errors as values of JSON, so that they cross from one process to another with all that they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from inferpool.errors import InferpoolError, InternalError, Refused

_KINDS: Final[dict[str, type[InferpoolError]]] = {}


def error_fields(error: InferpoolError) -> dict[str, Any]:
    """Return an error as an object for JSON."""
    fields: dict[str, Any] = {"error": type(error).__name__, "detail": error.detail}
    if error.members:
        fields["members"] = error.members
    if isinstance(error, Refused):
        fields["retry_after_s"] = error.retry_after_s
    return fields


def error_from_fields(fields: Mapping[str, Any]) -> InferpoolError:
    """Return the error that `error_fields` has described; raises ValueError if the object is another one."""
    detail, members = fields.get("detail"), fields.get("members", {})
    if not isinstance(detail, str):
        raise ValueError("an error without a detail came")
    if not isinstance(members, dict):
        raise ValueError("an error with members that are no mapping came")
    error = _kinds().get(str(fields.get("error")), InternalError)(detail)
    error.members = members
    after_s = fields.get("retry_after_s")
    if isinstance(error, Refused) and isinstance(after_s, (int, float)):
        error.retry_after_s = float(after_s)
    return error


def _kinds() -> dict[str, type[InferpoolError]]:
    """Every error of the project by the name of its class."""
    if not _KINDS:
        waiting: list[type[InferpoolError]] = [InferpoolError]
        while waiting:
            kind = waiting.pop()
            _KINDS[kind.__name__] = kind
            waiting += kind.__subclasses__()
    return _KINDS
