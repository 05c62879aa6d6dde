"""What differs between the ways of asking for a prediction; everything else is shared.

A dialect says which paths are its own, what a body says, how outputs are answered and how an error is
worded. Admission, the queue, deadlines, ids, timing, metrics and logs are the predictor's, for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from inferpool.errors import InferpoolError
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.problems import Headers
from inferpool.tensors import Tensors
from inferpool.wire.v2_request import RequestedOutput

Data: TypeAlias = bytes | memoryview
"""A body as it came, whole."""


class Target(NamedTuple):
    """What a path names: `model` is None where the body is to name it, `version` a number or label."""

    model: str | None
    version: str | None


class Options:
    """What a body says beside its tensors, where its format can; nothing changes it.

    Attributes:
        model: the model's name.
        version: number or label.
        id: the caller's name for the request.
        outputs: names of the outputs wanted, None for all.
        timeout_ms: milliseconds that the caller will wait.
        priority: 1 is the highest; 0 and None are the default.
        forms: how each output is wanted, where the dialect lets the caller say.
        binary: whether outputs whose form is not said are answered in binary.
    """

    __slots__ = ("binary", "forms", "id", "model", "outputs", "priority", "timeout_ms", "version")

    def __init__(
        self,
        model: str | None = None,
        version: str | None = None,
        id: str | None = None,
        outputs: tuple[str, ...] | None = None,
        timeout_ms: float | None = None,
        priority: int | None = None,
        forms: Sequence[RequestedOutput] | None = None,
        binary: bool = False,
    ) -> None:
        self.model = model
        self.version = version
        self.id = id
        self.outputs = outputs
        self.timeout_ms = timeout_ms
        self.priority = priority
        self.forms = forms
        self.binary = binary


class Body(ABC):
    """A body whose framing and options are read, and whose tensors are once the version is known."""

    options: Options

    @abstractmethod
    def tensors(self, served: ServedVersion) -> Tensors:
        """The inputs as the version takes them, checked against its signature; call it once.

        Raises UnsupportedMediaType, MalformedBody, InvalidInput or BodyTooLarge.
        """


class Encoded:
    """Outputs as they go back: `headers` name the body's type, `parts` follow one another."""

    __slots__ = ("headers", "parts")

    def __init__(self, headers: Headers, parts: Sequence[Data]) -> None:
        self.headers = headers
        self.parts = parts


class InferenceApi(ABC):
    """One way of asking for a prediction. Dialects have no state."""

    problem_type: bytes
    """The media type of errors."""

    @abstractmethod
    def target(self, path: str) -> Target | None:
        """What `path`, still percent-encoded, names; None where it is not this dialect's."""

    @abstractmethod
    def json_bytes(self, head: RequestHead, size: int) -> int:
        """How much of a body of `size` bytes is read as JSON."""

    @abstractmethod
    def open(self, head: RequestHead, data: Data, max_bytes: int) -> Body:
        """The body in `data`, which is not compressed any more.

        Raises MalformedBody, UnsupportedMediaType, or InvalidInput for a field beside the tensors.
        """

    @abstractmethod
    def encode(
        self, head: RequestHead, options: Options, request_id: str, served: ServedVersion, outputs: Tensors
    ) -> Encoded:
        """The answer for `outputs`; raises UnsupportedMediaType, InvalidInput or ModelFailed."""

    @abstractmethod
    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The body of an error's answer."""
