"""The predict lane in ASGI: in front of the framework, with nothing between it and the predictor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from service.errors import MethodNotAllowed
from service.http.head import Head
from service.http.predict import Answer, Call, Predictor

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class _Gone(Exception):
    """The client has disconnected: there is nobody to answer."""


async def serve_predict(predictor: Predictor, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one predict request, whatever happens to it."""
    call = Call(Head(scope["raw_path"].decode("latin-1"), scope["headers"]), predictor.clock())
    predictor.enter()
    try:
        answer = await _predict(predictor, call, scope, receive)
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [*answer.headers, (b"content-length", b"%d" % len(answer.body))],
            }
        )
        await send({"type": "http.response.body", "body": answer.body})
    except _Gone:
        pass
    finally:
        predictor.leave()


async def _predict(predictor: Predictor, call: Call, scope: Scope, receive: Receive) -> Answer:
    try:
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{scope['method']} is not for predictions: POST a body", allow="POST")
        predictor.admit(call)
        data = await _read_body(predictor, call.head, receive)
        if predictor.is_heavy(call.head, len(data)):
            tensors = await asyncio.to_thread(predictor.read, call, data)
        else:
            tensors = predictor.read(call, data)
        future = predictor.offer(call, tensors)
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
        predictor.drop(call)
        raise _Gone from None
    finally:
        departure.cancel()
        predictor.end(call)


async def _read_body(predictor: Predictor, head: Head, receive: Receive) -> bytes:
    """The whole body; raises BodyTooLarge as soon as it is more than the server takes."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > predictor.max_body_bytes:
            raise predictor.too_large()
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
