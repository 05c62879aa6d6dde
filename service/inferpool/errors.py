"""Everything that can go wrong, as values that carry what the caller needs to know.

The tree, by who is at fault:

    InferpoolError
    ├── RequestError              the caller can mend it
    │   ├── MalformedBody         not JSON, wrong header length, truncated tensor
    │   ├── BodyTooLarge          larger than the server takes
    │   ├── TooSlow               it takes too long to come
    │   ├── UnsupportedMediaType  a format that this model or route does not take
    │   ├── InvalidInput          a tensor or a field that the model does not take
    │   ├── NotFound              no such route
    │   │   ├── ModelNotFound
    │   │   └── VersionNotFound
    │   ├── MethodNotAllowed
    │   └── Forbidden
    ├── Refused                   nobody's fault: come back later (`retry_after_s`)
    │   ├── QueueFull
    │   ├── NotReady
    │   ├── Draining
    │   └── Overloaded
    ├── DeadlineExceeded          the answer would come too late to be of use
    ├── ModelFailed               the model raised on this request alone
    ├── OutOfMemory               a GPU has no memory for a batch; for a smaller one it may have
    ├── InternalError             a defect of the server's own
    └── LoadError                 a version cannot be served; its text is the version's reason
        ├── ConfigError           model.toml or a setting is wrong; names the file and the key
        └── UnfitForGpu           the model itself cannot run on a GPU as it has to

`code` is the stable word that clients match on; which HTTP status it becomes is known in
`inferpool.http.problems` alone. Every error pickles: it may cross a process boundary.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final, NamedTuple, TypeAlias

Reason: TypeAlias = str
"""Why something is not so, as one sentence for people. `Reason | None`: None means that nothing is wrong."""


class Verdict(NamedTuple):
    """Whether something holds, and why or why not, as one sentence for people."""

    ok: bool
    reason: Reason


_KEPT_CHARACTERS: Final = 300
_LAST_LINE: Final = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt): .+", re.MULTILINE)
"""The line at the end of a traceback that says what was raised, and why."""


def short_reason(error: BaseException) -> Reason:
    """The one line of an error's text that says why, of at most 300 characters; without a text, its class.

    That is the first line. If the text holds a traceback, as TorchScript's errors do, it is the last line.
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    raised = _LAST_LINE.findall(text) if "Traceback" in text else []
    return (raised or lines[:1])[-1][:_KEPT_CHARACTERS]


class InferpoolError(Exception):
    """The root: `detail` is one sentence for the caller, `members` are machine-readable facts."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str, **members: object) -> None:
        """Keep `detail` and the extra `members` (JSON-able values such as `tensor="x"`)."""
        super().__init__(detail)
        self.detail = detail
        self.members = members


class RequestError(InferpoolError):
    """The request is at fault; sending it again unchanged cannot help."""


class MalformedBody(RequestError):
    """The body is not what its headers say it is."""

    code = "malformed_body"


class BodyTooLarge(RequestError):
    """The body, or what it decompresses to, is larger than the server takes."""

    code = "body_too_large"


class TooSlow(RequestError):
    """The request takes too long to come: it holds a connection, and memory, for next to nothing."""

    code = "too_slow"


class UnsupportedMediaType(RequestError):
    """The body's format is not one that this model takes."""

    code = "unsupported_media_type"


class InvalidInput(RequestError):
    """A tensor or field is unknown, missing, or has the wrong datatype, shape or value."""

    code = "invalid_input"


class NotFound(RequestError):
    """Nothing is served under this path."""

    code = "not_found"


class ModelNotFound(NotFound):
    """No model of this name is in the repository."""

    code = "model_not_found"


class VersionNotFound(NotFound):
    """The model has no version of this number or label."""

    code = "version_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, but not with this method; `members["allow"]` says which it takes."""

    code = "method_not_allowed"


class Forbidden(RequestError):
    """The credentials are good, or none are needed, and still this is not allowed."""

    code = "forbidden"


class Refused(InferpoolError):
    """The request is good but cannot be taken now; `retry_after_s` says when it can."""

    code = "overloaded"

    def __init__(self, detail: str, retry_after_s: float = 1.0, **members: object) -> None:
        """Keep `retry_after_s`, the seconds after which another try is worth it."""
        super().__init__(detail, **members)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """The version's queue is full, in rows or in bytes."""

    code = "queue_full"


class NotReady(Refused):
    """The version is loading, has failed, or has lost its instances."""

    code = "not_ready"


class Draining(Refused):
    """The server is shutting down and takes no more requests."""

    code = "draining"


class Overloaded(Refused):
    """The server as a whole has no room for the request."""

    code = "overloaded"


class DeadlineExceeded(InferpoolError):
    """The deadline passed, or it can be foreseen that it will, before the model could run."""

    code = "deadline_exceeded"


class ModelFailed(InferpoolError):
    """The model raised on this request alone; the cause is in the log, not in the answer."""

    code = "model_failed"


class OutOfMemory(InferpoolError):
    """A GPU has no memory for a batch of this size; who asks with fewer rows may succeed."""

    code = "model_failed"


class InternalError(InferpoolError):
    """A defect of the server; the cause is in the log, not in the answer."""

    code = "internal_error"


class LoadError(InferpoolError):
    """A version cannot be served; `detail` is the reason that `/models` shows."""

    code = "load_failed"


class ConfigError(LoadError):
    """A setting or a `model.toml` is wrong; `detail` names the file and the key."""

    code = "config_error"


class UnfitForGpu(LoadError):
    """The model itself, not the machine, keeps it from a GPU: nodes without kernels, tensors of text."""

    code = "load_failed"
