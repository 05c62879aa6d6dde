"""`/status`: everything that a page shows of a server, in one response that is cheap to poll."""

from __future__ import annotations

import asyncio
import time
from hashlib import sha256
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from inferpool.http.accept_headers import accepts_gzip
from inferpool.http.conditional import answer_unless_known
from inferpool.http.media_types import JSON_TYPE
from inferpool.http.native.status_schemas import StatusOut, status_out
from inferpool.http.predict.compression import gzipped
from inferpool.http.route_table import RouteTable
from inferpool.observe.metrics import Metrics
from inferpool.repository.catalog import Catalog

FRESH_S: Final = 1.0
"""Seconds for which all who ask get one and the same body."""


class Status:
    """The body of `/status`, which is the same for all callers. It belongs to the event loop."""

    def __init__(self, catalog: Catalog, metrics: Metrics) -> None:
        self._catalog = catalog
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._made_at = -FRESH_S
        self._body = b""
        self._packed: bytes | None = None
        self._tag = ""

    async def answer(self, request: Request) -> Response:
        """The response to `request`: 304 if the client has the present body already."""
        async with self._lock:  # so that of many who ask at once, one waits for the figures
            if time.monotonic() - self._made_at >= FRESH_S:
                await self._catalog.refresh()
                # In a thread: with many versions this takes a while, and predictions must go on.
                self._body, self._packed, self._tag = await asyncio.to_thread(
                    _made, self._catalog, self._metrics
                )
                self._made_at = time.monotonic()
            body, packed, tag = self._body, self._packed, self._tag
        headers = {"content-type": JSON_TYPE, "cache-control": "private, no-cache"}
        if not accepts_gzip(request.headers.get("accept-encoding", "")):
            packed = None
        return answer_unless_known(request, body, packed, tag, headers)


def add_status(app: RouteTable, catalog: Catalog, metrics: Metrics) -> None:
    """Give `app` the route `/status`."""
    status = Status(catalog, metrics)

    @app.get(
        "/status",
        tags=["models"],
        summary="The health, the models and the figures of the whole server",
        response_model=StatusOut,
        responses={304: {"description": "Nothing has changed since the body with the ETag that was sent."}},
    )
    async def read_status(request: Request) -> Response:
        """The figures are those of all processes. A body is made once a second at most.

        Poll it with `If-None-Match`: while nothing changes, the answer is 304 and empty.
        """
        return await status.answer(request)


def _made(catalog: Catalog, metrics: Metrics) -> tuple[bytes, bytes | None, str]:
    """The body, the same as gzip if that is smaller, and its entity tag."""
    body = status_out(catalog, metrics).model_dump_json().encode()
    return body, gzipped([body]), f'W/"{sha256(body).hexdigest()[:32]}"'
