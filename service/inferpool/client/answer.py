"""Answers of a server: predictions, or errors by the same classes that the server raises."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from inferpool import errors
from inferpool.allowance import UNLIMITED
from inferpool.client.backoff import read_retry_after
from inferpool.errors import InferpoolError, Refused, RequestError
from inferpool.tensors import DTYPES, Array, TensorSpec, bf16_to_fp32, element_count, names_text
from inferpool.wire.npy import decode_npy, decode_npz
from inferpool.wire.v2_binary import read_binary

HEADER_LENGTH: Final = "inference-header-content-length"
JSON_TYPE: Final = "application/json"
NPY: Final = "application/x-npy"
NPZ: Final = "application/x-npz"
_REPEATED_STATUSES: Final = (429, 503)
_SHOWN_BYTES: Final = 200
_FIELDS: Final = ("type", "title", "status", "detail", "code", "request_id", "retry_after_ms")
_TIMING: Final = re.compile(r"(\w+);dur=([\d.]+)")


class ServerUnreachable(InferpoolError):
    """No server answers at the address, or the connection broke before the answer was complete."""

    code = "server_unreachable"


class UnexpectedAnswer(InferpoolError):
    """The answer is none of Inferpool's: a proxy may have sent it, or the address is wrong."""

    code = "unexpected_answer"


class Reply(NamedTuple):
    """An HTTP response.

    Attributes:
        status: its status.
        headers: its headers; names are looked up in any case.
        body: its content.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Prediction:
    """The answer to a prediction. `prediction["name"]` is an output.

    Attributes:
        outputs: the outputs by name, each with one row for each row of the inputs. They may be read-only.
        labels: for each row the best labels, best first, each a dict of `label` and `score`; None if they
            were not asked for.
        model: the name of the model that answered.
        version: the version that answered; None if the format of the answer does not say.
        request_id: the id of the request, which is also in the log of the server.
    """

    __slots__ = ("_timing", "labels", "model", "outputs", "request_id", "version")

    def __init__(
        self,
        outputs: dict[str, Array],
        *,
        labels: list[list[dict[str, Any]]] | None = None,
        model: str = "",
        version: str | None = None,
        request_id: str = "",
        timing: str = "",
    ) -> None:
        """Keep the parts; `timing` is the header Server-Timing."""
        self.outputs = outputs
        self.labels = labels
        self.model = model
        self.version = version
        self.request_id = request_id
        self._timing = timing

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(np.shape(value))}" for name, value in self.outputs.items())
        return f"<Prediction of {self.model} {self.version or ''}: {shapes}>"

    @property
    def array(self) -> Array:
        """The only output; raises ValueError if there are several."""
        if len(self.outputs) != 1:
            raise ValueError(f"the prediction has {len(self.outputs)} outputs: {', '.join(self.outputs)}")
        return next(iter(self.outputs.values()))

    @property
    def timing_ms(self) -> dict[str, float]:
        """Milliseconds at the server: waiting (`queue`), running (`compute`), and all of them (`total`)."""
        return {name: float(text) for name, text in _TIMING.findall(self._timing)}


def read_prediction(reply: Reply, model: str, outputs: Sequence[str] | None) -> Prediction:
    """Read a successful answer; `outputs` names the ones to keep, None for all.

    Raises UnexpectedAnswer if the answer is none of Inferpool's, or lacks an output.
    """
    headers = reply.headers
    kind = headers.get("content-type", "").partition(";")[0]
    prediction = Prediction(
        {}, model=model, request_id=headers.get("x-request-id", ""), timing=headers.get("server-timing", "")
    )
    try:
        length = headers.get(HEADER_LENGTH)
        if length is not None:
            _read_binary(prediction, reply.body, int(length))
        elif kind == NPZ:
            prediction.outputs = decode_npz(reply.body, UNLIMITED)
        elif kind == NPY:
            prediction.outputs = {"": decode_npy(reply.body, UNLIMITED)}
        elif kind == JSON_TYPE:
            _read_json(prediction, orjson.loads(reply.body))
        else:
            raise ValueError(f"its type is {kind or 'not given'}")
    except (InferpoolError, KeyError, TypeError, ValueError) as error:
        raise UnexpectedAnswer(f"the answer is not Inferpool's: {error}") from error
    if outputs is not None:
        missing = [name for name in outputs if name not in prediction.outputs]
        if missing:
            raise UnexpectedAnswer(
                f"the answer has no output {names_text(missing)}; it has {names_text(prediction.outputs)}"
            )
        prediction.outputs = {name: prediction.outputs[name] for name in outputs}
    return prediction


def _read_binary(prediction: Prediction, body: bytes, length: int) -> None:
    """Read an answer of the Open Inference Protocol with binary tensors behind `length` bytes of JSON."""
    answer = orjson.loads(body[:length])
    prediction.model, prediction.version = answer["model_name"], answer["model_version"]
    at = length
    for output in answer["outputs"]:
        name, datatype, shape = output["name"], output["datatype"], tuple(output["shape"])
        size = output["parameters"]["binary_data_size"]
        if not 0 <= size <= len(body) - at:
            raise ValueError(f"output {name} is cut off")
        tensor = read_binary(TensorSpec(name, datatype, shape), shape, body, at, size)
        prediction.outputs[name] = bf16_to_fp32(tensor) if datatype == "BF16" else tensor
        at += size


def _read_json(prediction: Prediction, answer: dict[str, Any]) -> None:
    if "outputs" not in answer or isinstance(answer["outputs"], list):
        # An answer of the Open Inference Protocol: a request without rows has no binary parts.
        prediction.model, prediction.version = answer["model_name"], answer["model_version"]
        for output in answer["outputs"]:
            shape, datatype = tuple(output["shape"]), output["datatype"]
            if output.get("data") or element_count(shape):
                raise ValueError(f"output {output['name']} is not in binary form")
            dtype = np.float32 if datatype == "BF16" else DTYPES[datatype]
            prediction.outputs[output["name"]] = np.empty(shape, dtype)
        return
    prediction.model, prediction.version = answer["model"], str(answer["version"])
    non_finite = answer.get("non_finite") or ()
    prediction.outputs = {
        name: np.array(value, np.float64 if name in non_finite else None)
        for name, value in answer["outputs"].items()
    }
    prediction.labels = answer.get("predictions")


def join_predictions(parts: Sequence[Prediction]) -> Prediction:
    """Return one prediction with the rows of all `parts`, in their order; there is at least one part."""
    first = parts[0]
    if len(parts) == 1:
        return first
    outputs = {name: np.concatenate([part.outputs[name] for part in parts]) for name in first.outputs}
    labels = None if first.labels is None else [row for part in parts for row in part.labels or ()]
    versions = {part.version for part in parts}
    return Prediction(
        outputs,
        labels=labels,
        model=first.model,
        version=first.version if len(versions) == 1 else None,
        request_id=first.request_id,
    )


def is_repeatable(status: int) -> bool:
    """Whether a request that was answered with `status` was not run, and may be accepted later."""
    return status in _REPEATED_STATUSES


def read_error(reply: Reply) -> InferpoolError:
    """Return the error in an answer whose status is 400 or more, by the class that the server has for it.

    It has the attributes `status` and `request_id`. An answer that is none of Inferpool's is an
    UnexpectedAnswer.
    """
    document: Any = None
    with suppress(orjson.JSONDecodeError):
        document = orjson.loads(reply.body)
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        # The routes of OpenAI's API have its error object.
        inner = document["error"]
        document = {"detail": inner.get("message"), "code": inner.get("code")}
    code = document.get("code") if isinstance(document, dict) else None
    retry_after_s = read_retry_after(reply.headers.get("retry-after"))
    if not isinstance(document, dict) or not isinstance(code, str):
        shown = reply.body[:_SHOWN_BYTES].decode(errors="replace")
        error: InferpoolError = UnexpectedAnswer(
            f"the answer has status {reply.status} and is not Inferpool's: {shown!r}"
        )
    else:
        detail = str(document.get("detail") or document.get("error") or code)
        error = _class_of(code, reply.status)(detail)
        error.members = {name: value for name, value in document.items() if name not in _FIELDS}
        if isinstance(error, Refused):
            error.retry_after_s = retry_after_s or 0.0
    error.status = reply.status
    error.request_id = reply.headers.get("x-request-id")
    if error.request_id:
        error.add_note(f"request id: {error.request_id}")
    return error


def _class_of(code: str, status: int) -> type[InferpoolError]:
    found = _CLASSES.get(code)
    if found is not None:
        return found
    # A newer server may know codes that this client does not.
    unknown: type[InferpoolError] = Refused if status in _REPEATED_STATUSES else InferpoolError
    return type(unknown.__name__, (RequestError if 400 <= status < 429 else unknown,), {"code": code})


def _classes() -> dict[str, type[InferpoolError]]:
    """Return the class of each code: the first in the module's order that states it."""
    found: dict[str, type[InferpoolError]] = {}
    for value in vars(errors).values():
        if not isinstance(value, type) or not issubclass(value, InferpoolError) or "code" not in vars(value):
            continue
        if value is not Refused and value is not InferpoolError:
            found.setdefault(value.code, value)
    return found


_CLASSES: Final = _classes()


def read_vectors(reply: Reply, count: int) -> Array:
    """Return the vectors of an answer of `/v1/embeddings` in base64, FP32, [count, width].

    Raises UnexpectedAnswer if it has no vector for each text.
    """
    try:
        data = orjson.loads(reply.body)["data"]
        vectors = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data]
        if len(vectors) == count:
            return np.stack(vectors) if vectors else np.empty((0, 0), np.float32)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        pass
    raise UnexpectedAnswer(f"the answer of /v1/embeddings is not Inferpool's: it has no {count} vectors")
