"""The protocol V1 of KServe and TensorFlow Serving: `instances` in, `predictions` out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import orjson

from inferpool.allowance import Allowance
from inferpool.codecs.base64_files import read_base64
from inferpool.errors import InferpoolError
from inferpool.http.media_types import JSON_TYPE
from inferpool.http.native.bodies import allow_rows
from inferpool.http.predict.api import (
    BY_OUTPUTS,
    BY_ROWS,
    Body,
    Data,
    Encoded,
    InferenceApi,
    Join,
    Options,
    Target,
    encoded_json,
    joined,
    match_target,
    refuse_unless_json,
)
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Tensors
from inferpool.wire.large_bytes import as_bytes
from inferpool.wire.v1_request import InstancesRequest, parse_instances
from inferpool.wire.v1_response import write_outputs, write_predictions

MODELS: Final = "/v1/models"

_PREDICT: Final = re.compile(r"/v1/models/([^/]+?)(?:/(?:versions|labels)/([^/]+?))?(?::|%3[Aa])predict")


class V1Api(InferenceApi):
    """The formats and paths of the predict routes of `/v1`."""

    problem_type = JSON_TYPE.encode()

    def target(self, path: str) -> Target | None:
        """Match `/v1/models/{model}:predict`, also with `/versions/{version}` or `/labels/{label}`.

        The colon may be percent-encoded.
        """
        return match_target(_PREDICT, path) if path.startswith(MODELS) else None

    def json_bytes(self, head: RequestHead, size: int) -> int:
        """The whole body."""
        return size

    def open(self, head: RequestHead, data: Data, allowance: Allowance) -> Body:
        """Open a JSON body."""
        refuse_unless_json(head, "/v1")
        body = as_bytes(data)
        allow_rows(body, allowance)
        return open_instances(parse_instances(body, allowance), allowance)

    def answers_json(self, head: RequestHead, options: Options) -> bool:
        """Whether the answer is JSON: always."""
        return True

    def encode(
        self,
        head: RequestHead,
        options: Options,
        request_id: str,
        served: ServedVersion,
        outputs: Tensors,
        join: Join | None = None,
    ) -> Encoded:
        """Encode the outputs by rows, or whole if the request had whole inputs."""
        by_outputs = options.answer == BY_OUTPUTS
        pieces: Iterable[Data] = (write_outputs if by_outputs else write_predictions)(outputs, served.bf16)
        return encoded_json(joined(pieces, join))

    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The protocol's error object, with the code for clients to match."""
        return orjson.dumps({"error": error.detail, "code": error.code})


def open_instances(request: InstancesRequest, allowance: Allowance) -> Body:
    """Return the body of a request with instances."""
    return _InstancesBody(request, allowance)


class _InstancesBody(Body):
    def __init__(self, request: InstancesRequest, allowance: Allowance) -> None:
        self._request = request
        self._allowance = allowance
        self.options = Options(
            timeout_ms=request.timeout_ms,
            priority=request.priority,
            answer=BY_OUTPUTS if request.by_columns else BY_ROWS,
        )

    def tensors(self, served: ServedVersion) -> Tensors:
        image = served.view.image
        texts = None if image is None else self._request.texts_of(image.input)
        if image is None or texts is None:
            return self._request.tensors(served.signature)
        files = read_base64(image.input, texts, self._allowance)
        return image.decode_rows(files, len(texts), self._allowance)


V1_API: Final = V1Api()
