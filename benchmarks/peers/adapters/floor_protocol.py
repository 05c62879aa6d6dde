"""A floor: a bare asyncio protocol over httptools on uvloop, with one batching thread.

It has none of what a server needs: no limits, no errors, no routes, no drain.
"""

from __future__ import annotations

import asyncio
from functools import partial

import httptools
import uvloop
from batching import Batcher
from shared import Model, arguments

given = arguments()


class Protocol(asyncio.Protocol):
    """Answers every request as a prediction, in the order in which runs end."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._parser = httptools.HttpRequestParser(self)
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self._batcher.offer(body, self._answer)

    def _answer(self, body: bytes) -> None:
        if self._transport.is_closing():
            return  # raising, it would keep the others of its batch from their answers
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)


async def serve() -> None:
    """Serve until the process is ended."""
    batcher = Batcher(Model(given.model, given.kind), given.rows)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(Protocol, batcher), "127.0.0.1", given.port)
    await server.serve_forever()


uvloop.run(serve())
