"""Errors as HTTP responses: the table from error code to status, and the headers of an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from inferpool.errors import (
    InferpoolError,
    InternalError,
    MethodNotAllowed,
    Overloaded,
    Refused,
    Unauthorized,
)

STATUSES: Final[Mapping[str, int]] = {
    "malformed_body": 400,
    "malformed_request": 400,
    "load_failed": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "version_not_found": 404,
    "method_not_allowed": 405,
    "too_slow": 408,
    "conflict": 409,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "head_too_large": 431,
    "invalid_input": 422,
    "model_rejected": 422,
    "queue_full": 429,
    "rate_limited": 429,
    "internal_error": 500,
    "model_failed": 500,
    "model_crashed": 500,
    "unsupported_transfer_coding": 501,
    "not_ready": 503,
    "draining": 503,
    "overloaded": 503,
    "deadline_exceeded": 504,
    "run_timeout": 504,
}
"""Error code to HTTP status; the README's table is checked against it."""

GRPC_STATUSES: Final[Mapping[str, str]] = {
    "malformed_body": "INVALID_ARGUMENT",
    "malformed_request": "INVALID_ARGUMENT",
    "load_failed": "FAILED_PRECONDITION",
    "unauthorized": "UNAUTHENTICATED",
    "forbidden": "PERMISSION_DENIED",
    "not_found": "NOT_FOUND",
    "model_not_found": "NOT_FOUND",
    "version_not_found": "NOT_FOUND",
    "method_not_allowed": "UNIMPLEMENTED",
    "too_slow": "DEADLINE_EXCEEDED",
    "conflict": "FAILED_PRECONDITION",
    "body_too_large": "RESOURCE_EXHAUSTED",
    "unsupported_media_type": "INVALID_ARGUMENT",
    "head_too_large": "RESOURCE_EXHAUSTED",
    "invalid_input": "INVALID_ARGUMENT",
    "model_rejected": "INVALID_ARGUMENT",
    "queue_full": "RESOURCE_EXHAUSTED",
    "rate_limited": "RESOURCE_EXHAUSTED",
    "internal_error": "INTERNAL",
    "model_failed": "INTERNAL",
    "model_crashed": "INTERNAL",
    "unsupported_transfer_coding": "UNIMPLEMENTED",
    "not_ready": "UNAVAILABLE",
    "draining": "UNAVAILABLE",
    "overloaded": "UNAVAILABLE",
    "deadline_exceeded": "DEADLINE_EXCEEDED",
    "run_timeout": "DEADLINE_EXCEEDED",
}
"""Error code to the name of the status of gRPC, for the same codes."""

Headers = list[tuple[bytes, bytes]]


def as_problem(error: Exception) -> InferpoolError:
    """`error` itself if it has a status, Overloaded for a lack of memory, else an InternalError.

    The latter hides the cause.
    """
    if isinstance(error, InferpoolError) and error.code in STATUSES:
        return error
    if isinstance(error, MemoryError):
        return Overloaded("memory ran out while this request was read or answered; try again later")
    return InternalError("the server failed on this request; its log has the cause, under the request id")


def problem_headers(error: InferpoolError) -> Headers:
    """The headers of an error response, except those of its body."""
    if isinstance(error, Refused):
        # Retry-After counts whole seconds (RFC 9110, 10.2.3); the body has the exact milliseconds.
        return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]
    if isinstance(error, Unauthorized):
        # RFC 6750, 3.1: only a request that came with a key is told that its key is wrong.
        wrong = b"" if error.members.get("reason") == "missing" else b', error="invalid_token"'
        return [(b"www-authenticate", b'Bearer realm="inferpool"' + wrong)]
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", str(error.members.get("allow", "GET")).encode())]
    return []
