"""The interface of an inference API: everything that differs between `/predict` and `/v2`.

An API recognises its paths, reads bodies, encodes outputs and formats errors. The predictor does the rest for
all APIs: admission, the queue, deadlines, ids, timing, metrics and logs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import unquote

from inferpool.allowance import Allowance
from inferpool.codecs.text import Rows
from inferpool.errors import InferpoolError, UnsupportedMediaType
from inferpool.http.media_types import JSON_TYPE, MEANT_AS_JSON
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.problems import Headers
from inferpool.tensors import Tensors, name_text
from inferpool.wire.v2_request import RequestedOutput

Data: TypeAlias = bytes | memoryview
"""The bytes of a complete body."""

Join: TypeAlias = Callable[[Iterable[Data]], list[bytes]]
"""Joins the pieces of a large answer to parts, while other threads run."""


NATIVE_ANSWER: Final = 0
BY_ROWS: Final = 1
BY_OUTPUTS: Final = 2
"""The forms of an answer, where an API has several: native, or as the protocol V1 has them."""


class Target(NamedTuple):
    """The target in a path: `model` is None if the body names it; `version` is a number, a label or None."""

    model: str | None
    version: str | None


def match_target(pattern: re.Pattern[str], path: str) -> Target | None:
    """Return the target in a path that matches `pattern`, whose groups are the model and the version.

    None if the path does not match.
    """
    found = pattern.fullmatch(path)
    if found is None:
        return None
    model, version = found.groups()
    return Target(unquote(model), None if version is None else unquote(version))


class Options:
    """The fields of a body other than its tensors, as far as its format has them.

    Never changed once the tensors are read.

    Attributes:
        model: the model's name.
        version: a version number or label.
        id: the client's name for the request.
        outputs: names of the outputs to return, None for all.
        timeout_ms: milliseconds that the client waits.
        priority: 1 is the highest; 0 and None mean the default.
        forms: the form of each output, if the API lets the client choose it.
        binary: whether outputs without a chosen form are returned in binary form.
        answer: the form of the answer, where an API has several.
        request: what the API needs of the request to write the answer; None for most APIs.
    """

    __slots__ = (
        "answer", "binary", "forms", "id", "model", "outputs", "priority", "request", "timeout_ms", "version",
    )  # fmt: skip

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
        answer: int = NATIVE_ANSWER,
        request: Any = None,
    ) -> None:
        self.model = model
        self.version = version
        self.id = id
        self.outputs = outputs
        self.timeout_ms = timeout_ms
        self.priority = priority
        self.forms = forms
        self.binary = binary
        self.answer = answer
        self.request = request


class Body(ABC):
    """A body whose options are read; its tensors are read once the version is known.

    Attributes:
        options: the fields other than the tensors.
        texts: the tokens of its texts, if `tensors` has encoded them itself.
    """

    options: Options
    texts: Sequence[Rows] = ()

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns that have become the only input of the model; empty without names."""
        return ()

    @abstractmethod
    def tensors(self, served: ServedVersion) -> Tensors:
        """Read the inputs and check them against the version's signature; call this once.

        Raises UnsupportedMediaType, MalformedBody, InvalidInput, BodyTooLarge, or Overloaded if other
        requests hold the memory that the tensors would take.
        """


class Encoded:
    """The encoded outputs: `headers` give the media type, the body is the concatenated `parts`."""

    __slots__ = ("headers", "parts")

    def __init__(self, headers: Headers, parts: Sequence[Data]) -> None:
        self.headers = headers
        self.parts = parts


_JSON_HEADERS: Final = [(b"content-type", JSON_TYPE.encode())]


def encoded_json(parts: Sequence[Data]) -> Encoded:
    """Return an answer in JSON."""
    return Encoded(_JSON_HEADERS, parts)


def joined(pieces: Iterable[Data], join: Join | None) -> list[bytes]:
    """Return the parts of an answer that is written in `pieces`; a large one is joined by `join`."""
    return [b"".join(pieces)] if join is None else join(pieces)


def refuse_unless_json(head: RequestHead, route: str, *others: str) -> None:
    """Raise UnsupportedMediaType if a body is not JSON, for a `route` that also takes `others`."""
    if head.content_type in MEANT_AS_JSON:
        return
    taken = [JSON_TYPE, *others]
    raise UnsupportedMediaType(
        f"the body is {name_text(head.content_type)}, {route} takes {' and '.join(taken)}", expected=taken
    )


class InferenceApi(ABC):
    """One inference API. An API has no state."""

    problem_type: bytes
    """The media type of errors."""

    @abstractmethod
    def target(self, path: str) -> Target | None:
        """The target of `path`, which is percent-encoded; None if the path belongs to another API."""

    @abstractmethod
    def json_bytes(self, head: RequestHead, size: int) -> int:
        """How many bytes of a body of `size` bytes are JSON."""

    def tensors_at(self, head: RequestHead) -> int:
        """Where in the body of `head` tensors in binary form begin; −1 if there are none."""
        return -1

    @abstractmethod
    def open(self, head: RequestHead, data: Data, allowance: Allowance) -> Body:
        """Open the decompressed body in `data`; what it becomes is reserved in `allowance`.

        Raises MalformedBody, UnsupportedMediaType, InvalidInput for a field other than the tensors, and what
        `Allowance.take` raises.
        """

    @abstractmethod
    def answers_json(self, head: RequestHead, options: Options) -> bool:
        """Whether any output is answered as JSON, and not all in binary form."""

    @abstractmethod
    def encode(
        self,
        head: RequestHead,
        options: Options,
        request_id: str,
        served: ServedVersion,
        outputs: Tensors,
        join: Join | None = None,
    ) -> Encoded:
        """Encode `outputs` as a response; with `join` in pieces, which it joins.

        Raises UnsupportedMediaType, InvalidInput or ModelFailed.
        """

    @abstractmethod
    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The body of an error response."""
