"""One predict request on its way, and the answer that goes back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from inferpool.codecs.text import Rows
from inferpool.http.predict.api import Data, InferenceApi, Options
from inferpool.http.predict.compression import gzipped
from inferpool.http.predict.request_head import RequestHead, new_request_id
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.problems import Headers
from inferpool.pool.ports import Entry


class Response:
    """What goes back; `headers` name the body's type, but not its length.

    Attributes:
        status: the HTTP status.
        headers: names are lower-case.
        parts: the body, one after the other; views of the outputs where these are large.
        size: bytes of the body.
        compressible: whether the caller takes gzip and the body is large enough for it.
    """

    __slots__ = ("compressible", "headers", "parts", "size", "status")

    def __init__(
        self, status: int, headers: Headers, parts: Sequence[Data], size: int, compressible: bool = False
    ) -> None:
        self.status = status
        self.headers = headers
        self.parts = parts
        self.size = size
        self.compressible = compressible


_NO_OPTIONS: Final = Options()


class PredictContext:
    """One predict request on its way: what its lane holds on to."""

    __slots__ = (
        "api",
        "aside_bytes",
        "aside_text",
        "began",
        "decode_s",
        "entry",
        "given_up",
        "head",
        "options",
        "recorded",
        "request_id",
        "reserved_bytes",
        "served",
        "texts",
        "timer",
    )  # fmt: skip

    def __init__(self, api: InferenceApi, head: RequestHead, began: float) -> None:
        """`began` is the moment at which the head was there."""
        self.api = api
        self.head = head
        self.began = began
        self.request_id = head.given_id or new_request_id()
        self.options = _NO_OPTIONS
        self.decode_s = 0.0
        self.reserved_bytes = 0
        self.recorded = self.given_up = self.aside_text = False
        self.aside_bytes = 0
        self.served: ServedVersion | None = None
        self.texts: Sequence[Rows] = ()
        self.entry: Entry | None = None
        self.timer: asyncio.TimerHandle | None = None


def compressed(answer: Response) -> Response:
    """`answer` as gzip where that makes it smaller; it may run in any thread."""
    packed = gzipped(answer.parts)
    if packed is None:
        return answer
    headers = [*answer.headers, (b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
    return Response(answer.status, headers, [packed], len(packed))
