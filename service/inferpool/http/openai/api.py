"""The routes that answer with vectors and scores of texts: `/v1/embeddings`, `/v1/rerank` and `/v1/score`.

The body names the model. Errors have the form of OpenAI's, which its clients read.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final

import orjson

from inferpool.allowance import Allowance
from inferpool.errors import InferpoolError
from inferpool.http.media_types import JSON_TYPE
from inferpool.http.openai.requests import EmbeddingsRequest, RerankRequest, ScoreRequest
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
    refuse_unless_json,
)
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Tensors
from inferpool.wire.json_bodies import read_object
from inferpool.wire.large_bytes import as_bytes

EMBEDDINGS: Final = ("/v1/embeddings", "/openai/v1/embeddings")
RERANK: Final = ("/v1/rerank", "/v2/rerank", "/openai/v1/rerank")
"""Cohere's clients of its API v2 call the second path; KServe has the last one."""
SCORE: Final = ("/v1/score", "/openai/v1/score")

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class TextApi(InferenceApi):
    """What the three routes have in common."""

    problem_type = JSON_TYPE.encode()

    @abstractmethod
    def read(self, fields: dict[str, Any]) -> Any:
        """Return the `TextRequest` of a body; raises InvalidInput with the field that is wrong."""

    def json_bytes(self, head: RequestHead, size: int) -> int:
        """The whole body."""
        return size

    def open(self, head: RequestHead, data: Data, allowance: Allowance) -> Body:
        """Open a JSON body."""
        refuse_unless_json(head, "this route")
        return _TextBody(self.read(read_object(as_bytes(data), '{"model": "…", …}', allowance)))

    def answers_json(self, head: RequestHead, options: Options) -> bool:
        """Whether the answer has the numbers of the output, and not fewer that are made of them."""
        return bool(options.request.answers_json)

    def encode(
        self,
        head: RequestHead,
        options: Options,
        request_id: str,
        served: ServedVersion,
        outputs: Tensors,
        join: Join | None = None,
    ) -> Encoded:
        """Write the answer that the request describes."""
        pieces = options.request.write(outputs, request_id)
        return encoded_json(joined(pieces, join))

    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """OpenAI's error object. `param` is the field or tensor that is wrong."""
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        param = error.members.get("field", error.members.get("tensor"))
        content = {"message": error.detail, "type": kind, "param": param, "code": error.code}
        return orjson.dumps({"error": content}, default=str)


class EmbeddingsApi(TextApi):
    """`/v1/embeddings`."""

    def target(self, path: str) -> Target | None:
        """Match the paths of embeddings."""
        return Target(None, None) if path in EMBEDDINGS else None

    def read(self, fields: dict[str, Any]) -> Any:
        """Return the request for vectors."""
        return EmbeddingsRequest(fields)


class RerankApi(TextApi):
    """`/v1/rerank` and `/v2/rerank`."""

    def target(self, path: str) -> Target | None:
        """Match the paths of rerank."""
        return Target(None, None) if path in RERANK else None

    def read(self, fields: dict[str, Any]) -> Any:
        """Return the request for the order of documents."""
        return RerankRequest(fields)


class ScoreApi(TextApi):
    """`/v1/score`."""

    def target(self, path: str) -> Target | None:
        """Match the paths of scores."""
        return Target(None, None) if path in SCORE else None

    def read(self, fields: dict[str, Any]) -> Any:
        """Return the request for scores of pairs."""
        return ScoreRequest(fields)


class _TextBody(Body):
    def __init__(self, request: Any) -> None:
        self._request = request
        self.options = Options(request.model, request.version, request=request)

    def tensors(self, served: ServedVersion) -> Tensors:
        """Encode the texts, which `texts` has then; there are no other tensors."""
        self.texts = self._request.encode(served)
        self.options.outputs = (self._request.output,)
        return {}


TEXT_APIS: Final[tuple[TextApi, ...]] = (EmbeddingsApi(), RerankApi(), ScoreApi())
