"""The native dialect: `/predict`, nested lists or arrays in and out, problems as RFC 9457 has them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final
from urllib.parse import unquote

import orjson

from service.errors import InferpoolError, Refused, UnsupportedMediaType
from service.http.bodies import JSON, MEANT_AS_JSON, NPY, NPZ, open_body
from service.http.compression import read_weights
from service.http.dialect import Body, Data, Dialect, Encoded, Options, Target
from service.http.head import Head
from service.http.served import Served
from service.tensors import Tensors
from service.wire.json import encode_response
from service.wire.npy import encode_npy, encode_npz

PREDICT: Final = "/predict"


class Native(Dialect):
    """What Inferpool's own routes speak."""

    problem_type = b"application/problem+json"

    def target(self, path: str) -> Target | None:
        """`/predict`, `/predict/{model}` and `/predict/{model}/{version}`."""
        if not path.startswith(PREDICT) or path[len(PREDICT) : len(PREDICT) + 1] not in ("", "/"):
            return None
        model, slash, version = path[len(PREDICT) :].strip("/").partition("/")
        return Target(unquote(model) or None, unquote(version) if slash else None)

    def json_bytes(self, head: Head, size: int) -> int:
        """All of it, by its media type."""
        return size if head.content_type in MEANT_AS_JSON else 0

    def open(self, head: Head, data: Data, max_bytes: int) -> Body:
        """By the media type: JSON is read here, all else once the model is known."""
        return open_body(head, bytes(data), max_bytes)

    def encode(
        self, head: Head, options: Options, request_id: str, served: Served, outputs: Tensors
    ) -> Encoded:
        """In the media type that the caller accepts."""
        wanted = _wanted(head.accept)
        if wanted == NPY and len(outputs) == 1:
            return Encoded([(b"content-type", NPY.encode())], [encode_npy(next(iter(outputs.values())))])
        if wanted == NPZ:
            return Encoded([(b"content-type", NPZ.encode())], [encode_npz(outputs)])
        if wanted == NPY:
            raise UnsupportedMediaType(
                f"the answer has {len(outputs)} outputs: ask for one by name, or accept {NPZ}",
                expected=[JSON, NPZ],
            )
        view = served.view
        classes = view.classes
        predictions = None
        if classes is not None and classes.output in outputs:
            predictions = classes.predictions(outputs)
        body = encode_response(
            view.key.model,
            served.version,
            options.id or request_id,
            outputs,
            predictions,
            served.bf16,
        )
        return Encoded([(b"content-type", JSON.encode())], [body])

    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The `application/problem+json` body (RFC 9457) of an error."""
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
        return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY, default=str)


def _wanted(accept: str) -> str:
    """Which of the answer's formats an Accept header prefers; JSON where it does not say, or names none."""
    if "application/x-np" not in accept.lower():
        return JSON
    weights = read_weights(accept)
    arrays = max((NPY, NPZ), key=lambda kind: weights.get(kind, 0.0))
    return arrays if weights.get(arrays, 0.0) > weights.get(JSON, 0.0) else JSON


NATIVE: Final = Native()
