"""What cloud platforms post: SageMaker's `/invocations`, Azure ML's `/score`, and the paths of Vertex AI.

These paths name no model. They take every body that the native routes and `/v1` take. A native body gets a
native answer, every other one `{"predictions": …}`, or what Accept asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from inferpool.allowance import Allowance
from inferpool.codecs.csv_table import write_csv
from inferpool.errors import InferpoolError
from inferpool.http.media_types import CSV, JSON_LINES, JSON_TYPE, MEANT_AS_JSON, NPY, NPZ
from inferpool.http.native.api import NATIVE_API, wanted_type
from inferpool.http.native.bodies import allow_rows, open_body, open_request
from inferpool.http.predict.api import (
    BY_ROWS,
    NATIVE_ANSWER,
    Body,
    Data,
    Encoded,
    InferenceApi,
    Join,
    Options,
    Target,
    joined,
)
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.v1.api import V1_API, open_instances
from inferpool.tensors import Tensors
from inferpool.wire.large_bytes import as_bytes, lines_as_list
from inferpool.wire.v1_request import InstancesRequest, parse_either
from inferpool.wire.v1_response import write_lines

INVOCATIONS: Final = "/invocations"
SCORE: Final = "/score"

_STARTS_LIST: Final = re.compile(rb"\s{0,1000}\[")
_VERTEX: Final = re.compile(r"/v1/endpoints/[^/]+/deployedModels/[^/]+:(?:predict|rawPredict)")
_ATTRIBUTE: Final = re.compile(r"\s*(model|version)\s*=\s*([^,;\s]+)\s*")


class PlatformApi(InferenceApi):
    """The formats and paths of the predictions that platforms ask for."""

    problem_type = NATIVE_API.problem_type

    def target(self, path: str) -> Target | None:
        """Match `/invocations`, `/score`, and Vertex AI's path of a deployed model."""
        if path in (INVOCATIONS, SCORE) or (path.startswith("/v1/e") and _VERTEX.fullmatch(path)):
            return Target(None, None)
        return None

    def json_bytes(self, head: RequestHead, size: int) -> int:
        """The whole body if its media type is JSON, else 0."""
        return size if head.content_type in MEANT_AS_JSON or head.content_type == JSON_LINES else 0

    def open(self, head: RequestHead, data: Data, allowance: Allowance) -> Body:
        """Open the body by its media type, and JSON by its fields."""
        content = as_bytes(data)
        is_json = head.content_type in MEANT_AS_JSON
        if head.content_type == JSON_LINES:
            allowance.take(2 * len(content), "the lines of the body")
            content = lines_as_list(content, b"instances")
        elif is_json and _STARTS_LIST.match(content) is not None:
            # Unlike a sum, a join lets other threads run while it copies.
            content = b"".join((b'{"instances":', content, b"}"))
        elif not is_json:
            body = open_body(head, content, allowance)
            body.options = _named(head, body.options, BY_ROWS)
            return body
        allow_rows(content, allowance)
        request = parse_either(content, allowance)
        if isinstance(request, InstancesRequest):
            body = open_instances(request, allowance)
            body.options = _named(head, body.options, body.options.answer)
        else:
            body = open_request(request, allowance)
            answer = NATIVE_ANSWER if request.table_field is None else BY_ROWS
            body.options = _named(head, body.options, answer)
        return body

    def answers_json(self, head: RequestHead, options: Options) -> bool:
        """Whether Accept prefers text to arrays."""
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
        """Encode the outputs as Accept asks; else in the form that goes with the body."""
        wanted = wanted_type(head.accept)
        pieces: Iterable[Data]
        if wanted == CSV:
            pieces, kind = write_csv(outputs, served.bf16, header=False), CSV
        elif JSON_LINES in head.accept:
            pieces, kind = write_lines(outputs, served.bf16), JSON_LINES
        elif wanted == JSON_TYPE and options.answer != NATIVE_ANSWER:
            return V1_API.encode(head, options, request_id, served, outputs, join)
        else:
            return NATIVE_API.encode(head, options, request_id, served, outputs, join)
        return Encoded([(b"content-type", kind.encode())], joined(pieces, join))

    def problem(self, error: InferpoolError, status: int, request_id: str) -> bytes:
        """The `application/problem+json` body (RFC 9457) of an error."""
        return NATIVE_API.problem(error, status, request_id)


def _named(head: RequestHead, options: Options, answer: int) -> Options:
    """Return `options` with the model that SageMaker's header names, and the form of the answer."""
    model, version = options.model, options.version
    for part in head.attributes.split(","):
        found = _ATTRIBUTE.fullmatch(part)
        if found is not None and found[1] == "model":
            model = found[2]
        elif found is not None:
            version = found[2]
    return Options(
        model, version, options.id, options.outputs, options.timeout_ms, options.priority, answer=answer
    )


PLATFORM_API: Final = PlatformApi()
