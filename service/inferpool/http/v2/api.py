"""The Open Inference Protocol v2 over REST, with Triton's binary tensor data extension."""

from __future__ import annotations

import re
from typing import Final

import orjson

from inferpool.allowance import Allowance
from inferpool.errors import InferpoolError
from inferpool.http.media_types import JSON_TYPE, OCTET_STREAM
from inferpool.http.predict.api import (
    Body,
    Data,
    Encoded,
    InferenceApi,
    Join,
    Options,
    Target,
    encoded_json,
    match_target,
    refuse_unless_json,
)
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Tensors
from inferpool.wire.v2_request import COPIED_JSON_BYTES, InferRequest, parse_infer
from inferpool.wire.v2_response import encode_infer

PREFIX: Final = "/v2"

_INFER: Final = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


class V2Api(InferenceApi):
    """The formats and paths of the infer routes of `/v2`."""

    problem_type = JSON_TYPE.encode()

    def target(self, path: str) -> Target | None:
        """Match `/v2/models/{model}/infer` and `/v2/models/{model}/versions/{version}/infer`."""
        return match_target(_INFER, path)

    def json_bytes(self, head: RequestHead, size: int) -> int:
        """The bytes before the binary tensors, from the header; without it the whole body."""
        return size if head.header_length is None else min(size, head.header_length)

    def tensors_at(self, head: RequestHead) -> int:
        """Behind the JSON, unless most of the body may be JSON."""
        length = head.header_length
        return -1 if length is None or length > COPIED_JSON_BYTES else length

    def open(self, head: RequestHead, data: Data, allowance: Allowance) -> Body:
        """Open JSON, JSON with binary tensors, or one raw tensor, depending on the header length."""
        json_length = head.json_length()
        # A client that sends the header length speaks this protocol, whatever its media type.
        if json_length is None:
            refuse_unless_json(head, "/v2", OCTET_STREAM)
        return _InferBody(parse_infer(data, json_length, allowance))

    def answers_json(self, head: RequestHead, options: Options) -> bool:
        """Whether the request wants any output as JSON."""
        if options.forms is None:
            return not options.binary
        return not all(
            options.binary if form.binary_data is None else form.binary_data for form in options.forms
        )

    def encode(
        self,
        head: RequestHead,
        options: Options,
        request_id: str,
        served: ServedVersion,
        outputs: Tensors,
        join: Join | None = None,
    ) -> Encoded:
        """Encode JSON, followed by the outputs that the request wants in binary form."""
        parts, json_length = encode_infer(
            served.view.key.model,
            served.version,
            options.id or "",
            outputs,
            options.forms,
            options.binary,
            served.signature,
            served.class_names,
            join,
        )
        if json_length is None:
            return encoded_json(parts)
        return Encoded(
            [
                (b"content-type", OCTET_STREAM.encode()),
                (b"inference-header-content-length", b"%d" % json_length),
            ],
            parts,
        )

    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The protocol's error object, with the code for clients to match."""
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
