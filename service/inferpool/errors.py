"""The errors of the project: each carries what its caller needs to know.

The tree, by the party at fault:

    InferpoolError
    ├── RequestError              the client can correct the request
    │   ├── MalformedBody         not JSON, wrong header length, truncated tensor
    │   ├── BodyTooLarge          larger than the server accepts
    │   ├── TooSlow               it arrives too slowly
    │   ├── MalformedRequest      not HTTP/1.1
    │   ├── UnsupportedTransferCoding  a transfer coding beside chunked
    │   ├── HeadTooLarge          a request line and headers larger than the server accepts
    │   ├── UnsupportedMediaType  a format that this model or route does not take
    │   ├── InvalidInput          a tensor or a field that the model does not take
    │   ├── ModelRejected         the model refuses the values or sizes of this input
    │   ├── NotFound              no such route
    │   │   ├── ModelNotFound
    │   │   └── VersionNotFound
    │   ├── MethodNotAllowed
    │   ├── Unauthorized          no key, or one that the server does not accept
    │   └── Forbidden
    ├── Refused                   nobody is at fault: retry later (`retry_after_s`)
    │   ├── QueueFull
    │   ├── NotReady
    │   ├── Draining
    │   └── Overloaded
    ├── DeadlineExceeded          the response would come too late
    ├── RunTimeout                the model ran longer than it may
    ├── ModelFailed               the model raised an error for this request alone
    ├── ModelCrashed              the model's process ended on this request, twice
    ├── OutOfMemory               a GPU lacks memory for a batch; a smaller batch may fit
    ├── InternalError             a defect of the server
    └── LoadError                 a version cannot be served; the text is the reason
        ├── ConfigError           model.toml or a setting is wrong; names the file and the key
        ├── LoadCancelled         somebody has cancelled the load
        ├── StoreError            a store refuses, or has no models that can be taken
        │   └── StoreUnreachable  a store does not answer; a later try may succeed
        └── UnfitForGpu           the model itself cannot run on a GPU

`code` is a stable word for clients to match; `inferpool.http.problems` maps it to an HTTP status. Every
error can be pickled, because it may cross a process boundary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple, TypeAlias

Reason: TypeAlias = str
"""One sentence for people that says why something fails; in `Reason | None`, None means no objection."""


class Verdict(NamedTuple):
    """Whether something holds, with one sentence for people that says why or why not."""

    ok: bool
    reason: Reason


_REASON_CHARACTERS: Final = 300
_LAST_LINE: Final = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt): .+", re.MULTILINE)
"""The last line of a traceback, which names the exception and its text."""


def short_reason(error: BaseException) -> Reason:
    """The one line of an error's text that says why, of at most 300 characters; without a text, its class.

    That is the first line. If the text holds a traceback, as TorchScript's errors do, it is the last line.
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    raised = _LAST_LINE.findall(text) if "Traceback" in text else []
    return (raised or lines[:1])[-1][:_REASON_CHARACTERS]


class InferpoolError(Exception):
    """The root: `detail` is one sentence for the client, `members` are machine-readable facts.

    An error that the client of `inferpool.client` raises has the `status` of the response and the id of the
    request, `request_id`, if there was a response.
    """

    code: ClassVar[str] = "internal_error"
    status: int | None = None
    request_id: str | None = None

    def __init__(self, detail: str, **members: object) -> None:
        """Keep `detail` and the extra `members` (JSON-able values such as `tensor="x"`)."""
        super().__init__(detail)
        self.detail = detail
        self.members = members


class RequestError(InferpoolError):
    """The request is at fault; a retry without a change fails again."""


class MalformedBody(RequestError):
    """The body does not match its headers or its format."""

    code = "malformed_body"


class BodyTooLarge(RequestError):
    """The body is larger than the server accepts, before or after decompression."""

    code = "body_too_large"


class TooSlow(RequestError):
    """The request arrives too slowly, and holds a connection and memory meanwhile."""

    code = "too_slow"


class MalformedRequest(RequestError):
    """The data is not an HTTP/1.1 request, so the rest of the connection cannot be understood."""

    code = "malformed_request"


class UnsupportedTransferCoding(RequestError):
    """The body has a transfer coding beside `chunked`, so the rest of the connection cannot be understood."""

    code = "unsupported_transfer_coding"


class HeadTooLarge(RequestError):
    """The request line and headers are larger than the server accepts."""

    code = "head_too_large"


class UnsupportedMediaType(RequestError):
    """The model or the route does not take the format of the body."""

    code = "unsupported_media_type"


class InvalidInput(RequestError):
    """A tensor or field is unknown, missing, or has the wrong datatype, shape or value."""

    code = "invalid_input"


class ModelRejected(RequestError):
    """The model cannot run this input: an index out of range, or a size that its operations cannot take."""

    code = "model_rejected"


class NotFound(RequestError):
    """No route matches the path."""

    code = "not_found"


class ModelNotFound(NotFound):
    """The repository has no model with this name."""

    code = "model_not_found"


class VersionNotFound(NotFound):
    """The model has no version with this number or label."""

    code = "version_not_found"


class MethodNotAllowed(RequestError):
    """The route does not take this method; `allow` lists the methods that it takes."""

    code = "method_not_allowed"


class Unauthorized(RequestError):
    """The request has no key, or one that the server does not accept; `reason` tells which."""

    code = "unauthorized"


class Forbidden(RequestError):
    """The server does not allow this operation, or not to this caller."""

    code = "forbidden"


class Conflict(RequestError):
    """The state of a model does not allow this operation; the detail says which state would."""

    code = "conflict"


class LoadFailed(RequestError):
    """The model cannot be served; the detail is the reason that `/models` shows."""

    code = "load_failed"


class Refused(InferpoolError):
    """The request is valid but cannot be accepted now; `retry_after_s` tells when to retry."""

    code = "overloaded"

    def __init__(self, detail: str, retry_after_s: float = 1.0, **members: object) -> None:
        """Keep `retry_after_s`, the seconds after which a retry may succeed."""
        super().__init__(detail, **members)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """The version's queue is full, in rows or in bytes."""

    code = "queue_full"


class RateLimited(Refused):
    """The tenant of the request's key has sent as many requests or rows as it may."""

    code = "rate_limited"


class NotReady(Refused):
    """The version is loading, has failed, or has lost its instances."""

    code = "not_ready"


class Draining(Refused):
    """The server is shutting down and accepts no more requests."""

    code = "draining"


class Overloaded(Refused):
    """The server has no room for the request, whatever its model."""

    code = "overloaded"


class DeadlineExceeded(InferpoolError):
    """The deadline passed before the model had answered, or is certain to pass."""

    code = "deadline_exceeded"


class RunTimeout(InferpoolError):
    """The model ran longer on this request alone than a run may take."""

    code = "run_timeout"


class ModelFailed(InferpoolError):
    """The model raised an error for this request alone; the log has the cause, the response has not."""

    code = "model_failed"


class ModelCrashed(InferpoolError):
    """The process that runs the model ended while it ran this request, and again when it ran it alone."""

    code = "model_crashed"


class OutOfMemory(InferpoolError):
    """A GPU lacks memory for a batch of this size; a request with fewer rows may succeed."""

    code = "model_failed"


class InternalError(InferpoolError):
    """A defect of the server; the log has the cause, the response has not."""

    code = "internal_error"


class LoadError(InferpoolError):
    """A version cannot be served; `detail` is the reason that `/models` shows."""

    code = "load_failed"


class ConfigError(LoadError):
    """A setting or a `model.toml` is wrong; `detail` names the file and the key."""

    code = "config_error"


class LoadCancelled(LoadError):
    """Somebody has cancelled the load, or the version is no longer wanted."""


class RunsElsewhere(LoadError):
    """A version has no instance on the device of this engine; another engine loads it."""

    def __init__(self, devices: Sequence[str]) -> None:
        """`devices` are those on which the version runs."""
        super().__init__(f"it runs on {', '.join(devices)}, which another engine has")
        self.devices = devices


class StoreError(LoadError):
    """A store refuses, or has no models that can be taken; the text names no credentials."""


class StoreUnreachable(StoreError):
    """A store does not answer; a later try may succeed."""


class UnfitForGpu(LoadError):
    """The model itself cannot run on a GPU: it has nodes without kernels or tensors of text."""

    code = "load_failed"
