"""Errors as answers: the one table from code to status, and the headers that go with an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from inferpool.errors import InferpoolError, InternalError, MethodNotAllowed, Refused

STATUSES: Final[Mapping[str, int]] = {
    "malformed_body": 400,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "version_not_found": 404,
    "method_not_allowed": 405,
    "too_slow": 408,
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

Headers = list[tuple[bytes, bytes]]


def as_problem(error: Exception) -> InferpoolError:
    """The error itself where it is one of ours; else an InternalError that says nothing of the inside."""
    if isinstance(error, InferpoolError) and error.code in STATUSES:
        return error
    return InternalError("the server failed on this request; its log says why, under the request's id")


def problem_headers(error: InferpoolError) -> Headers:
    """Headers that an error's answer has beside its body's own."""
    if isinstance(error, Refused):
        # Retry-After counts whole seconds (RFC 9110, 10.2.3); the body has it to the millisecond.
        return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", str(error.members.get("allow", "GET")).encode())]
    return []
