"""The dialect of the Open Inference Protocol v2 over REST, with Triton's binary tensor data extension."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

import orjson

from inferpool.errors import InferpoolError, UnsupportedMediaType
from inferpool.http.predict.api import Body, Data, Encoded, InferenceApi, Options, Target
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Tensors
from inferpool.wire.v2_request import InferRequest, parse_infer
from inferpool.wire.v2_response import encode_infer

PREFIX: Final = "/v2"
BINARY_TYPE: Final = "application/octet-stream"

_INFER: Final = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_TAKEN: Final = frozenset(("", "application/json", BINARY_TYPE, "application/x-www-form-urlencoded"))
"""What the protocol's clients call their bodies, or curl does where nothing was said."""
_JSON_ANSWER: Final = [(b"content-type", b"application/json")]


class V2Api(InferenceApi):
    """What `/v2` speaks."""

    problem_type = b"application/json"

    def target(self, path: str) -> Target | None:
        """`/v2/models/{model}/infer` and `/v2/models/{model}/versions/{version}/infer`."""
        found = _INFER.fullmatch(path)
        if found is None:
            return None
        model, version = found.groups()
        return Target(unquote(model), None if version is None else unquote(version))

    def json_bytes(self, head: RequestHead, size: int) -> int:
        """What the header says to stand before the tensors; else all of it."""
        return size if head.header_length is None else min(size, head.header_length)

    def open(self, head: RequestHead, data: Data, max_bytes: int) -> Body:
        """JSON, JSON followed by tensors, or one raw tensor, as `Inference-Header-Content-Length` says."""
        json_length = head.json_length()
        # Who says where the JSON ends speaks this protocol, whatever he calls the body.
        if json_length is None and head.content_type not in _TAKEN:
            raise UnsupportedMediaType(
                f'"{head.content_type}" is not a format of this protocol',
                expected=["application/json", BINARY_TYPE],
            )
        return _InferBody(parse_infer(data, json_length))

    def encode(
        self, head: RequestHead, options: Options, request_id: str, served: ServedVersion, outputs: Tensors
    ) -> Encoded:
        """JSON, followed by the outputs that are wanted in binary form."""
        parts, json_length = encode_infer(
            served.view.key.model,
            served.version,
            options.id or "",
            outputs,
            options.forms,
            options.binary,
            served.signature,
            served.class_names,
        )
        if json_length is None:
            return Encoded(_JSON_ANSWER, parts)
        return Encoded(
            [
                (b"content-type", BINARY_TYPE.encode()),
                (b"inference-header-content-length", b"%d" % json_length),
            ],
            parts,
        )

    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The protocol's error object, with the code that clients match on."""
        return orjson.dumps({"error": error.detail, "code": error.code})


class _InferBody(Body):
    def __init__(self, request: InferRequest) -> None:
        self._request = request
        outputs = request.outputs
        self.options = Options(
            id=request.id,
            outputs=None if outputs is None else tuple(output.name for output in outputs),
            timeout_ms=request.timeout_ms,
            priority=request.priority,
            forms=outputs,
            binary=request.binary_data_output,
        )

    def tensors(self, served: ServedVersion) -> Tensors:
        return self._request.tensors(served.signature)


V2_API: Final = V2Api()
