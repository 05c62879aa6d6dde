"""A floor: an ASGI application on uvicorn and nothing else, with one batching thread."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from batching import Batcher
from shared import Model, arguments

given = arguments()
batcher: Batcher | None = None
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer every request as a prediction."""
    global batcher
    if batcher is None:
        batcher = Batcher(Model(given.model, given.kind), given.rows)
    parts = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    batcher.offer(b"".join(parts), lambda body: future.done() or future.set_result(body))
    body = await future
    length = (b"content-length", str(len(body)).encode())
    await send({**HEAD, "headers": [*HEAD["headers"], length]})
    await send({"type": "http.response.body", "body": body})


uvicorn.run(
    application,
    host="127.0.0.1",
    port=given.port,
    loop="uvloop",
    http="httptools",
    ws="none",
    lifespan="off",
    access_log=False,
    proxy_headers=False,
    server_header=False,
    date_header=False,
    log_level="warning",
)
