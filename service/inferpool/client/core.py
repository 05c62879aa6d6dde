"""The logic of the client without input and output: what to send and when to send it again.

A function here is a generator. It yields an `Attempt`, and gets a `Reply` or a `Failure`; or it yields a
`Pause`, and gets None once it is over. `Client` and `AsyncClient` run the same generators.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote

import orjson

from inferpool.client.answer import (
    HEADER_LENGTH,
    JSON_TYPE,
    NPZ,
    Prediction,
    Reply,
    ServerUnreachable,
    UnexpectedAnswer,
    is_repeatable,
    read_error,
    read_prediction,
    read_vectors,
)
from inferpool.client.backoff import Backoff, read_retry_after
from inferpool.client.content import (
    ARROW,
    Arrays,
    Content,
    Encoded,
    Form,
    Frame,
    Part,
    Pictures,
    Sentences,
    encode_arrays,
    encode_form,
    encode_frame,
    encode_npz_arrays,
    encode_pictures,
    encode_sentences,
)
from inferpool.client.metadata import Metadata, read_metadata
from inferpool.errors import (
    DeadlineExceeded,
    Forbidden,
    InferpoolError,
    InvalidInput,
    Unauthorized,
    UnsupportedMediaType,
)
from inferpool.tensors import Array

GRACE_S: Final = 0.5
"""How much longer than its deadline a client waits for the answer, which says more than that time is up."""
_MOST_KNOWN: Final = 1024
"""The most models whose metadata a client keeps."""

_T = TypeVar("_T")


class Attempt(NamedTuple):
    """A request to send once.

    Attributes:
        method: the HTTP method.
        path: the path, percent-encoded.
        headers: names and values.
        parts: the body.
        timeout_s: how long to wait for the answer; None for ever.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    parts: Sequence[Part]
    timeout_s: float | None


class Failure(NamedTuple):
    """Why there is no answer: `timed_out` if it took too long, else the connection failed."""

    reason: str
    timed_out: bool = False


class Pause(NamedTuple):
    """A time to wait."""

    seconds: float


Outcome: TypeAlias = Reply | Failure | None
Steps: TypeAlias = Generator[Attempt | Pause, Outcome, _T]


class Options(NamedTuple):
    """Options of a prediction beside its inputs; see `Client.predict`."""

    version: str | int | None = None
    outputs: Sequence[str] | None = None
    labels: bool = False
    timeout_s: float | None = None
    request_id: str | None = None


class Core:
    """State of a client between requests: headers, deadlines, retries, and the known models."""

    def __init__(
        self,
        headers: Sequence[tuple[str, str]],
        backoff: Backoff,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Send `headers` with every request; `timeout_s` is for calls that name no timeout of their own."""
        self._headers = [*headers]
        self._backoff = backoff
        self._timeout_s = timeout_s
        self._clock = clock
        # None for a model whose metadata the key may not read.
        self._known: dict[str, Metadata | None] = {}
        self._arrow = True

    def predict(self, model: str, content: Content, options: Options) -> Steps[Prediction]:
        """Answer a prediction; raises the errors of `Client.predict`."""
        deadline = self._deadline(options.timeout_s)
        if isinstance(content, Arrays) and not options.labels:
            return (yield from self._infer(model, content, options, deadline))
        if isinstance(content, Frame):
            return (yield from self._predict_frame(model, content, options, deadline))
        if isinstance(content, Arrays):
            encoded = encode_npz_arrays(content)
        elif isinstance(content, Sentences):
            encoded = encode_sentences(content)
        elif isinstance(content, Pictures):
            encoded = encode_pictures(content)
        elif isinstance(content, Form):
            encoded = encode_form(content)
        else:
            encoded = Encoded(content.media_type, [content.content])
        return (yield from self._predict_natively(model, encoded, options, deadline))

    def metadata(
        self, model: str, version: str | int | None, timeout_s: float | None = None
    ) -> Steps[Metadata]:
        """Return the inputs and outputs of a model."""
        return (yield from self._ask_metadata(model, version, self._deadline(timeout_s)))

    def models(self) -> Steps[list[dict[str, Any]]]:
        """Return what the server serves, as `GET /models` has it."""
        answer = yield from self._ask_json("/models", self._deadline(None))
        found = answer.get("models")
        if not isinstance(found, list):
            raise UnexpectedAnswer('the answer of /models is not Inferpool\'s: it has no list "models"')
        return found

    def embed(
        self, model: str, texts: Sequence[str], input_type: str | None, options: Options
    ) -> Steps[Array]:
        """Return a vector for each text, FP32, [texts, width]; raises the errors of `Client.embed`."""
        body: dict[str, Any] = {"model": model, "input": [*texts], "encoding_format": "base64"}
        if options.version is not None:
            body["version"] = str(options.version)
        if input_type is not None:
            body["input_type"] = input_type
        encoded = Encoded(JSON_TYPE, [orjson.dumps(body)])
        deadline = self._deadline(options.timeout_s)
        reply = yield from self._send("/v1/embeddings", encoded, [], options, deadline)
        return read_vectors(reply, len(texts))

    def ready(self, model: str | None) -> Steps[bool]:
        """Return whether the server, or one of its models, answers predictions now; asks once."""
        path = "/health/ready" if model is None else f"/v2/models/{quote(model, safe='')}/ready"
        outcome = yield Attempt("GET", path, self._headers, (), self._remaining(self._deadline(None)))
        if not isinstance(outcome, Reply):
            return False
        if outcome.status in (401, 403, 404):
            raise read_error(outcome)
        return outcome.status < 300

    def _infer(
        self, model: str, arrays: Arrays, options: Options, deadline: float | None
    ) -> Steps[Prediction]:
        """Send arrays in the binary form, or as npz if the key may not read the metadata."""
        key = _v2_path(model, options.version)
        known = self._known.get(key)
        try:
            if known is not None:
                return (yield from self._infer_as(known, model, arrays, options, deadline))
        except InvalidInput:
            # The model may take other inputs than it did when it was asked.
            self._known.pop(key, None)
            newest = yield from self._find_out(key, model, options, deadline)
            if newest is None or newest == known:
                raise
            return (yield from self._infer_as(newest, model, arrays, options, deadline))
        if key not in self._known:
            known = yield from self._find_out(key, model, options, deadline)
        if known is not None:
            return (yield from self._infer_as(known, model, arrays, options, deadline))
        encoded = encode_npz_arrays(arrays)
        return (yield from self._predict_natively(model, encoded, options, deadline))

    def _infer_as(
        self, metadata: Metadata, model: str, arrays: Arrays, options: Options, deadline: float | None
    ) -> Steps[Prediction]:
        encoded = encode_arrays(arrays, metadata, options.outputs)
        path = f"{_v2_path(model, options.version)}/infer"
        headers = [(HEADER_LENGTH, str(encoded.header_length))]
        reply = yield from self._send(path, encoded, headers, options, deadline)
        return read_prediction(reply, model, options.outputs)

    def _find_out(
        self, key: str, model: str, options: Options, deadline: float | None
    ) -> Steps[Metadata | None]:
        """Ask for the metadata of a model and keep them; returns None if the key may not read them."""
        found: Metadata | None = None
        with suppress(Forbidden, Unauthorized):
            found = yield from self._ask_metadata(model, options.version, deadline, options.request_id)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[key] = found
        return found

    def _predict_frame(
        self, model: str, frame: Frame, options: Options, deadline: float | None
    ) -> Steps[Prediction]:
        """Send a data frame as Arrow; as JSON once the server has said that it does not read Arrow."""
        encoded = encode_frame(frame, arrow=self._arrow)
        try:
            return (yield from self._predict_natively(model, encoded, options, deadline))
        except UnsupportedMediaType:
            if encoded.media_type != ARROW:
                raise
        self._arrow = False
        encoded = encode_frame(frame, arrow=False)
        return (yield from self._predict_natively(model, encoded, options, deadline))

    def _predict_natively(
        self, model: str, encoded: Encoded, options: Options, deadline: float | None
    ) -> Steps[Prediction]:
        version = "" if options.version is None else f"/{quote(str(options.version), safe='')}"
        path = f"/predict/{quote(model, safe='')}{version}"
        headers = [("accept", JSON_TYPE if options.labels else NPZ)]
        reply = yield from self._send(path, encoded, headers, options, deadline)
        return read_prediction(reply, model, options.outputs)

    def _send(
        self,
        path: str,
        encoded: Encoded,
        headers: list[tuple[str, str]],
        options: Options,
        deadline: float | None,
    ) -> Steps[Reply]:
        headers += (
            ("content-type", encoded.media_type),
            ("content-length", str(sum(map(len, encoded.parts)))),
        )
        if options.request_id is not None:
            headers.append(("x-request-id", options.request_id))
        return (yield from self._repeat("POST", path, headers, encoded.parts, deadline))

    def _ask_metadata(
        self, model: str, version: str | int | None, deadline: float | None, request_id: str | None = None
    ) -> Steps[Metadata]:
        answer = yield from self._ask_json(_v2_path(model, version), deadline, request_id)
        try:
            return read_metadata(answer)
        except (KeyError, TypeError, ValueError) as error:
            raise UnexpectedAnswer(f"the metadata of {model} are not Inferpool's: {error!r}") from None

    def _ask_json(
        self, path: str, deadline: float | None, request_id: str | None = None
    ) -> Steps[dict[str, Any]]:
        headers = [] if request_id is None else [("x-request-id", request_id)]
        reply = yield from self._repeat("GET", path, headers, (), deadline)
        try:
            answer = orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise UnexpectedAnswer(f"the answer of {path} is not Inferpool's: it is no JSON object")
        return answer

    def _repeat(
        self,
        method: str,
        path: str,
        headers: list[tuple[str, str]],
        parts: Sequence[Part],
        deadline: float | None,
    ) -> Steps[Reply]:
        """Send a request until it is answered, and again as long as that may help and time is left.

        A request is repeated if the server refused it for the moment (429, 503), or if the connection failed:
        a prediction changes nothing at the server. Raises the last error.
        """
        attempt = 0
        while True:
            remaining = self._remaining(deadline)
            timeout = [] if remaining is None else [("x-timeout-ms", f"{1000 * remaining:.3f}")]
            outcome = yield Attempt(
                method,
                path,
                [*self._headers, *headers, *timeout],
                parts,
                None if remaining is None else remaining + GRACE_S,
            )
            if isinstance(outcome, Reply) and outcome.status < 400:
                if outcome.status >= 300:
                    raise UnexpectedAnswer(
                        f"the answer of {path} has status {outcome.status}; check the address"
                    )
                return outcome
            error, wait_s = self._judge(outcome, attempt)
            if wait_s is None or (deadline is not None and self._clock() + wait_s >= deadline):
                raise error
            yield Pause(wait_s)
            attempt += 1

    def _judge(self, outcome: Outcome, attempt: int) -> tuple[InferpoolError, float | None]:
        """Return the error that `outcome` is, and the seconds until the request is repeated, or None."""
        if isinstance(outcome, Reply):
            error = read_error(outcome)
            if not is_repeatable(outcome.status):
                return error, None
            return error, self._backoff.wait_s(attempt, read_retry_after(outcome.headers.get("retry-after")))
        assert outcome is not None  # a pause is not judged
        if outcome.timed_out:
            return DeadlineExceeded(f"no answer within the timeout: {outcome.reason}"), None
        return ServerUnreachable(outcome.reason), self._backoff.wait_s(attempt, None)

    def _deadline(self, timeout_s: float | None) -> float | None:
        chosen = self._timeout_s if timeout_s is None else timeout_s
        return None if chosen is None else self._clock() + chosen

    def _remaining(self, deadline: float | None) -> float | None:
        """Return the seconds that are left; raises DeadlineExceeded if there are none."""
        if deadline is None:
            return None
        remaining = deadline - self._clock()
        if remaining <= 0 or not math.isfinite(remaining):
            raise DeadlineExceeded("the timeout is over before the request was sent")
        return remaining


def _v2_path(model: str, version: str | int | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(str(version), safe='')}"
