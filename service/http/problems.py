"""Errors as answers: the one table from code to status, and the body that says what went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import orjson

from service.errors import InferpoolError, InternalError, MethodNotAllowed, Refused

STATUSES: Final[Mapping[str, int]] = {
    "malformed_body": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "version_not_found": 404,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "invalid_input": 422,
    "queue_full": 429,
    "internal_error": 500,
    "model_failed": 500,
    "not_ready": 503,
    "draining": 503,
    "overloaded": 503,
    "deadline_exceeded": 504,
}
"""Error code to HTTP status; the README's table is checked against it."""

PROBLEM_TYPE: Final = b"application/problem+json"

Headers = list[tuple[bytes, bytes]]


def as_problem(error: Exception) -> InferpoolError:
    """The error itself where it is one of ours; else an InternalError that says nothing of the inside."""
    if isinstance(error, InferpoolError) and error.code in STATUSES:
        return error
    return InternalError("the server failed on this request; its log says why, under the request's id")


def problem_body(error: InferpoolError, request_id: str) -> tuple[int, bytes]:
    """The status and the `application/problem+json` body (RFC 9457) of an error."""
    status = STATUSES[error.code]
    document = {
        **error.members,
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "request_id": request_id,
    }
    if isinstance(error, Refused):
        document["retry_after_ms"] = round(1000 * error.retry_after_s, 3)
    return status, orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY, default=str)


def problem_headers(error: InferpoolError) -> Headers:
    """Headers that an error's answer has beside its body's own."""
    if isinstance(error, Refused):
        # Retry-After counts whole seconds (RFC 9110, 10.2.3); the body has it to the millisecond.
        return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", str(error.members.get("allow", "GET")).encode())]
    return []
