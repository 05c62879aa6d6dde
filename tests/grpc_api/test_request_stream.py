"""A stream frees what it holds, at whatever moment it ends."""

from __future__ import annotations

import asyncio
from typing import Any

from inferpool.grpc_api.message_budget import FIRST_BYTES, SMALL_BYTES, MessageBudget
from inferpool.grpc_api.request_stream import RequestStream

MOST = 10 * FIRST_BYTES
TOTAL = 8 * MOST + SMALL_BYTES


class Messages:
    """The messages of a call."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()

    async def read(self) -> bytes:
        return await self.queue.get()


async def answered(data: bytes, context: Any) -> bytes:
    return data


def test_a_stream_that_ends_before_a_request_has_begun_frees_its_memory() -> None:
    async def run() -> None:
        budget, messages = MessageBudget(TOTAL, MOST), Messages()
        stream: Any = RequestStream(budget, messages, answered, "a")  # type: ignore[arg-type]
        messages.queue.put_nowait(bytes(MOST))
        await asyncio.sleep(0)  # the message is read, and the task of its answer has not begun
        await stream.close()
        assert budget.take(TOTAL)

    asyncio.run(run())


def test_a_stream_that_ends_before_it_has_read_has_no_responses() -> None:
    async def run() -> None:
        stream = RequestStream(MessageBudget(TOTAL, MOST), Messages(), answered, None)  # type: ignore[arg-type]
        stream.end()
        async with asyncio.timeout(10):
            assert [response async for response in stream.responses()] == []
        await stream.close()

    asyncio.run(run())
