"""The predict lane in ASGI: in front of the framework, with nothing between it and the predictor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from inferpool.errors import MethodNotAllowed
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.api import Data, InferenceApi, Target
from inferpool.http.predict.body_buffer import BodyBuffer
from inferpool.http.predict.context import PredictContext, Response, compressed
from inferpool.http.predict.offload import HEAVY_BYTES
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.v2.api import V2_API
from inferpool.pool.ports import Result

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

APIS: Final[tuple[InferenceApi, ...]] = (NATIVE_API, V2_API)
FOLLOWS: Final = "follows"
"""Where in the state of its scope a request finds out whether others stand behind it on its connection."""

_JOINED_BYTES: Final = 64 * 1024
"""Up to this, joining an answer's parts costs less than to send one more of them."""


class _Gone(Exception):
    """The client has disconnected: there is nobody to answer."""


def find_api(path: str) -> tuple[InferenceApi, Target] | None:
    """The dialect of a path, still percent-encoded, and what it names; None for other routes."""
    for api in APIS:
        target = api.target(path)
        if target is not None:
            return api, target
    return None


def is_last(predictor: Predictor, scope: Scope) -> bool:
    """Whether the answer is the last on its connection: the server parts, and no request stands behind."""
    follows: Callable[[], bool] | None = scope.get("state", {}).get(FOLLOWS)
    return predictor.parting and not (follows is not None and follows())


async def serve_predict(
    predictor: Predictor, api: InferenceApi, target: Target, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer one predict request, whatever happens to it."""
    call = PredictContext(api, RequestHead(*target, scope["headers"]), predictor.clock())
    predictor.enter()
    try:
        answer = await _predict(predictor, call, scope, receive)
        if answer.compressible:
            heavy = answer.size > HEAVY_BYTES
            answer = await asyncio.to_thread(compressed, answer) if heavy else compressed(answer)
        await _send(answer, send, last=is_last(predictor, scope))
    except _Gone:
        predictor.drop(call)
    finally:
        predictor.leave(call)


async def _predict(predictor: Predictor, call: PredictContext, scope: Scope, receive: Receive) -> Response:
    try:
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{scope['method']} is not for predictions: POST a body", allow="POST")
        predictor.admit(call)
        data = await _read_body(predictor, call, receive)
        if predictor.is_heavy(call, data):
            loop = asyncio.get_running_loop()
            threads = predictor.set_aside(call, len(data), lambda: None)
            try:
                tensors = await loop.run_in_executor(threads, predictor.read, call, data)
            finally:
                predictor.taken_back(call)
        else:
            tensors = predictor.read(call, data)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        predictor.offer(call, tensors, lambda result: _settle(future, result))
    except _Gone:
        raise
    except Exception as error:  # noqa: BLE001 - a defect answers 500 and is logged; the lane lives on
        return predictor.refusal(call, error)
    # The only event that a complete request can still bring is its client's departure.
    departure = asyncio.ensure_future(receive())
    departure.add_done_callback(lambda _: future.cancel())
    try:
        return predictor.answer(call, await future)
    except asyncio.CancelledError:
        if not departure.done():
            raise
        raise _Gone from None
    finally:
        departure.cancel()
        predictor.end(call)


def _settle(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():  # it is cancelled where the client has gone
        future.set_result(result)


async def _read_body(predictor: Predictor, call: PredictContext, receive: Receive) -> Data:
    """The whole body; raises BodyTooLarge or Overloaded as soon as it is more than the server takes."""
    intake = BodyBuffer(call.head, predictor.max_body_bytes)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        chunk = message.get("body", b"")
        predictor.reserve(call, len(chunk))
        intake.add(chunk)
        if not message.get("more_body", False):
            return intake.whole()


async def _send(answer: Response, send: Send, *, last: bool) -> None:
    parts = answer.parts
    if len(parts) > 1 and answer.size <= _JOINED_BYTES:
        parts = [b"".join(parts)]
    headers = [*answer.headers, (b"content-length", b"%d" % answer.size)]
    if last:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1]})
