"""The web application: every route but predictions, which `PredictProtocol` answers itself.

The routes are made when the first request for one comes: most servers of models answer predictions, and the
imports of the framework take longer than the load of a small model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

from inferpool.errors import Forbidden
from inferpool.http.access.cors import CorsPolicy, is_preflight, origin_of
from inferpool.http.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    api_of,
    caller_of,
    find_api,
    is_last,
    refuse_method,
)
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.forwarded import FORWARDED_FROM, TENANT
from inferpool.http.connection.shared import SharedState
from inferpool.http.media_types import JSON_TYPE, MEANT_AS_JSON
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.request_id import request_id_from
from inferpool.http.predict.response import server_timing
from inferpool.http.problems import STATUSES, Headers

if TYPE_CHECKING:
    from inferpool.http.routes import Routes

_WITH_BODIES = ("POST", "PUT")
_CONTENT_TYPE = b"content-type"
_SHOWN_CHARACTERS = 200
"""Characters of an origin that an error text repeats."""


class Application:
    """Adds the id and timing to every response, and refuses all methods but POST for predictions.

    Attributes:
        predictor: answers the predict requests of every API.
        shared: what all connections share.
        read_batcher: reads from the connections of the server.
    """

    def __init__(
        self, shared: SharedState, read_batcher: ReadBatcher, make_routes: Callable[[], Routes]
    ) -> None:
        """`make_routes` makes the routes that are no predictions, in a thread."""
        self.predictor: Predictor = shared.predictor
        self.shared = shared
        self.read_batcher = read_batcher
        self._make_routes = make_routes
        self._routes: Routes | None = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] != "http":
            raise ValueError(f"the server has no {scope['type']}; send HTTP requests")
        cors = self.shared.cors
        if cors is not None:
            origin = origin_of(scope["headers"])
            send = _crossing(send, cors.headers(origin))
            if is_preflight(scope["method"], scope["headers"]):
                # Before anything asks for a key: a browser sends none with a preflight.
                await _answer_preflight(cors, origin or b"", scope, _signed(scope, send, self.predictor))
                return
        if scope["path"] == "/docs/":
            await _redirect_docs(_signed(scope, send, self.predictor))
            return
        found = find_api(scope["raw_path"].decode("latin-1"))
        if found is not None:
            await refuse_method(self.predictor, self.shared.gate, *found, scope, send)
        else:
            if scope["method"] == "HEAD":
                # The routes answer HEAD as GET; the server omits the body, because its own scope says HEAD.
                scope = {**scope, "method": "GET"}
            elif scope["method"] in _WITH_BODIES:
                scope = {**scope, "headers": _announced_as_json(scope["headers"])}
            send = _signed(scope, send, self.predictor)
            routes = self._routes or await self._first_routes()
            await routes.answer(scope, receive, send)

    async def _first_routes(self) -> Routes:
        """Make the routes. Predictions go on meanwhile."""
        async with self._making:
            if self._routes is None:
                self._routes = await asyncio.to_thread(self._make_routes)
        return self._routes


def _crossing(send: Send, headers: Headers) -> Send:
    """`send` that adds the headers for pages of other origins."""

    async def cross(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return cross


async def _redirect_docs(send: Send) -> None:
    # Relative, because a proxy may serve the application below a path, a name or a scheme of its own.
    headers = [(b"content-length", b"0"), (b"location", b"../docs")]
    await send({"type": "http.response.start", "status": 307, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _answer_preflight(cors: CorsPolicy, origin: bytes, scope: Scope, send: Send) -> None:
    """Tell a browser whether a page of `origin` may send a request; such a question counts as no request."""
    if cors.allows(origin):
        status, body = 204, b""
        headers = cors.preflight_headers(scope["headers"])
    else:
        shown = origin[:_SHOWN_CHARACTERS].decode("latin-1")
        error = Forbidden(f'pages of the origin "{shown}" may not use this server; see --cors-allow-origin')
        api = api_of(scope["path"])
        status = STATUSES[error.code]
        body = api.problem(error, status, scope["state"]["request_id"])
        headers = [(b"content-type", api.problem_type), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _announced_as_json(headers: Headers) -> Headers:
    """`headers`, with the media type of JSON in place of none, or of what curl sends by default."""
    given = next((value for name, value in headers if name == _CONTENT_TYPE), b"").decode("latin-1")
    if given.partition(";")[0].strip().lower() not in MEANT_AS_JSON:
        return headers
    kept = [header for header in headers if header[0] != _CONTENT_TYPE]
    return [*kept, (_CONTENT_TYPE, JSON_TYPE.encode())]


def _signed(scope: Scope, send: Send, predictor: Predictor) -> Send:
    """`send` that adds the request id, the timing and, for the last response, `connection: close`."""
    began = predictor.clock()
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
    request_id = scope.setdefault("state", {})["request_id"] = request_id_from(given)

    async def sign(message: Message) -> None:
        if message["type"] == "http.response.start":
            state = scope["state"]
            if FORWARDED_FROM in state and "caller" in state:
                message["headers"] = [
                    *message["headers"],
                    (TENANT, quote(caller_of(scope).tenant, safe="").encode()),
                ]
            message["headers"] = [
                *message["headers"],
                (b"x-request-id", request_id.encode("latin-1")),
                (b"server-timing", server_timing(0.0, 0.0, predictor.clock() - began)),
            ]
            if is_last(predictor, scope):
                message["headers"].append((b"connection", b"close"))
        await send(message)

    return sign
