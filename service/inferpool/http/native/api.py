"""The native API, `/predict`: nested lists or arrays in and out, errors as RFC 9457 problems."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final
from urllib.parse import unquote

import orjson

from inferpool.allowance import Allowance
from inferpool.codecs.csv_table import write_csv
from inferpool.errors import InferpoolError, Refused, UnsupportedMediaType
from inferpool.http.accept_headers import read_weights
from inferpool.http.media_types import CSV, JSON_TYPE, MEANT_AS_JSON, NPY, NPZ, PROBLEM_JSON
from inferpool.http.native.bodies import open_body
from inferpool.http.predict.api import (
    Body,
    Data,
    Encoded,
    InferenceApi,
    Join,
    Options,
    Target,
    encoded_json,
    joined,
)
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Tensors
from inferpool.wire.json_pieces import write_answer
from inferpool.wire.native_json import encode_response
from inferpool.wire.npy import encode_npz, npy_parts

PREDICT: Final = "/predict"
_TITLES: Final = {status.value: status.phrase for status in HTTPStatus}


class NativeApi(InferenceApi):
    """The formats and paths of Inferpool's own predict routes."""

    problem_type = PROBLEM_JSON.encode()

    def target(self, path: str) -> Target | None:
        """Match `/predict`, `/predict/{model}` and `/predict/{model}/{version}`."""
        if not path.startswith(PREDICT) or path[len(PREDICT) : len(PREDICT) + 1] not in ("", "/"):
            return None
        model, slash, version = path[len(PREDICT) :].strip("/").partition("/")
        return Target(unquote(model) or None, unquote(version) if slash else None)

    def json_bytes(self, head: RequestHead, size: int) -> int:
        """The whole body if its media type is JSON, else 0."""
        return size if head.content_type in MEANT_AS_JSON else 0

    def tensors_at(self, head: RequestHead) -> int:
        """At the beginning of an npy file: the length of its header is a multiple of the alignment."""
        return 0 if head.content_type == NPY else -1

    def open(self, head: RequestHead, data: Data, allowance: Allowance) -> Body:
        """Open the body by its media type: JSON is parsed here, other formats once the model is known."""
        return open_body(head, data, allowance)

    def answers_json(self, head: RequestHead, options: Options) -> bool:
        """Whether Accept prefers JSON, or CSV, which takes as much."""
        return wanted_type(head.accept) not in (NPY, NPZ)

    def encode(
        self,
        head: RequestHead,
        options: Options,
        request_id: str,
        served: ServedVersion,
        outputs: Tensors,
        join: Join | None = None,
    ) -> Encoded:
        """Encode the outputs in the media type that the client accepts."""
        wanted = wanted_type(head.accept)
        if wanted == NPY and len(outputs) == 1:
            return Encoded([(b"content-type", NPY.encode())], npy_parts(next(iter(outputs.values()))))
        if wanted == NPZ:
            return Encoded([(b"content-type", NPZ.encode())], [encode_npz(outputs)])
        if wanted == NPY:
            raise UnsupportedMediaType(
                f"the response has {len(outputs)} outputs, {NPY} holds one; name one output, or accept {NPZ}",
                expected=[JSON_TYPE, NPZ],
            )
        if wanted == CSV:
            lines = write_csv(outputs, served.bf16, header=True)
            return Encoded([(b"content-type", b"text/csv; header=present")], joined(lines, join))
        view = served.view
        classes = view.classes
        labelled = classes is not None and classes.output in outputs
        if join is not None:
            pieces = write_answer(
                view.key.model,
                served.version,
                options.id or request_id,
                outputs,
                classes.write_predictions(outputs) if classes is not None and labelled else None,
                served.bf16,
            )
            return encoded_json(join(pieces))
        predictions = classes.predictions(outputs) if classes is not None and labelled else None
        body = encode_response(
            view.key.model,
            served.version,
            options.id or request_id,
            outputs,
            predictions,
            served.bf16,
        )
        return encoded_json([body])

    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The `application/problem+json` body (RFC 9457) of an error."""
        document = {
            **error.members,
            "type": "about:blank",
            "title": _TITLES[status],
            "status": status,
            "detail": error.detail,
            "code": error.code,
            "request_id": request_id,
        }
        if isinstance(error, Refused):
            document["retry_after_ms"] = round(1000 * error.retry_after_s, 3)
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY, default=str)


def wanted_type(accept: str) -> str:
    """The response format that an Accept header prefers; JSON if it names none of the formats."""
    if not accept or accept == "*/*":  # most requests
        return JSON_TYPE
    lower = accept.lower()
    if "application/x-np" not in lower and CSV not in lower:
        return JSON_TYPE
    weights = read_weights(accept)
    arrays = max((NPY, NPZ, CSV), key=lambda kind: weights.get(kind, 0.0))
    return arrays if weights.get(arrays, 0.0) > weights.get(JSON_TYPE, 0.0) else JSON_TYPE


NATIVE_API: Final = NativeApi()
