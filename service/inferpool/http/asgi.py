"""Predictions in the ASGI application: their paths, and that they take POST alone.

`PredictProtocol` answers every POST to a path of predictions itself, below ASGI. The application sees only
requests with other methods for such a path, and refuses them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from inferpool.errors import InferpoolError, MethodNotAllowed
from inferpool.http.access.caller import PREDICT, Caller
from inferpool.http.access.client_certificates import KEYLESS
from inferpool.http.access.gate import Gate
from inferpool.http.native.api import NATIVE_API
from inferpool.http.openai.api import TEXT_APIS
from inferpool.http.platforms.api import PLATFORM_API
from inferpool.http.predict.api import InferenceApi, Target
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.v1.api import MODELS, V1_API
from inferpool.http.v2.api import PREFIX, V2_API

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

APIS: Final[tuple[InferenceApi, ...]] = (NATIVE_API, V2_API, V1_API, PLATFORM_API, *TEXT_APIS)
FOLLOWS: Final = "follows"
"""The key in a scope's state of a function that tells whether the client has pipelined another request."""


def find_api(path: str) -> tuple[InferenceApi, Target] | None:
    """Return the API that a path belongs to and what the path names, or None for all other routes.

    `path` is still percent-encoded.
    """
    for api in APIS:
        target = api.target(path)
        if target is not None:
            return api, target
    return None


def api_of(path: str) -> InferenceApi:
    """Return the API whose form errors of `path` have."""
    for api in TEXT_APIS:
        if api.target(path.partition("?")[0]) is not None:
            return api
    if path.startswith(PREFIX) and path[len(PREFIX) :][:1] in ("", "/", "?"):
        return V2_API
    if path.startswith(MODELS) and path[len(MODELS) :][:1] in ("", "/", "?"):
        return V1_API
    return NATIVE_API


def is_last(predictor: Predictor, scope: Scope) -> bool:
    """Return whether a response is the last on its connection: the server stops, and nothing is pipelined."""
    follows: Callable[[], bool] | None = scope.get("state", {}).get(FOLLOWS)
    return predictor.in_flight.closing and not (follows is not None and follows())


def caller_of(scope: Scope) -> Caller:
    """Return who sent a request of the application; the gate has let it pass."""
    caller: Caller = scope["state"]["caller"]
    return caller


def peer_of(scope: Scope) -> str:
    """Return the address of a request's client, without its port; "" if it has none."""
    client = scope.get("client")
    return str(client[0]) if client else ""


async def refuse_method(
    predictor: Predictor, gate: Gate, api: InferenceApi, target: Target, scope: Scope, send: Send
) -> None:
    """Answer 405 to a request for a path of predictions whose method is not POST."""
    head = RequestHead(*target, scope["headers"])
    head.came_to(scope["method"].encode("latin-1"), scope["raw_path"])
    context = PredictContext(api, head, predictor.clock())
    context.peer = peer_of(scope)
    error: InferpoolError = MethodNotAllowed(
        f"{scope['method']} is not for predictions: POST a body", allow="POST"
    )
    try:
        gate.authorize(
            scope["headers"], PREDICT, target.model, peer_of(scope), scope.get("state", {}).get(KEYLESS)
        )
    except InferpoolError as refusal:
        error = refusal
    response = predictor.refuse(context, error)
    headers = [*response.headers, (b"content-length", b"%d" % response.size)]
    if is_last(predictor, scope):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"".join(response.parts)})
