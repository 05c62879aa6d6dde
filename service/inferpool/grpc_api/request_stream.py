"""One call of `ModelStreamInfer`: many requests on a stream, whose responses come in the same order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from inferpool.errors import InferpoolError
from inferpool.grpc_api.message_budget import COPIES, MessageBudget
from inferpool.grpc_api.messages import message
from inferpool.grpc_api.wire_format import split_raw

MOST_WAITING: Final = 32
"""Requests of one stream that run or whose responses wait. The next is read once the first is answered."""
_ID_BYTES: Final = 64 * 1024
"""The id of a message with more beside raw contents is not looked for when its request fails."""
_FINAL: Final[bytes] = message("ModelInferResponse")(
    parameters={"triton_final_response": {"bool_param": True}}
).SerializeToString()
"""Behind a message, it adds a parameter: there is one response for each request."""
_RESPONSE_TAG: Final = b"\x12"
"""The tag of `infer_response` in `ModelStreamInferResponse`."""


class RequestStream:
    """Reads the requests of one call, and has them answered side by side.

    While a stream waits for its next message, the message may be large and on its way, or the client may be
    idle: gRPC does not say. So an open stream holds the memory of the largest message.
    """

    def __init__(
        self,
        budget: MessageBudget,
        context: grpc.aio.ServicerContext[Any, Any],
        answer: Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Coroutine[Any, Any, bytes]],
        tenant: str | None,
    ) -> None:
        """Reserve the memory. `answer` returns the response to a request.

        `tenant` is whose stream it is, None if the server knows no tenants. Raises Overloaded, or
        RateLimited.
        """
        self._budget = budget
        self._tenant = tenant
        self._held = budget.take_for_stream(tenant)
        self._context = context
        self._answer = answer
        self._answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(MOST_WAITING)
        self._tasks: set[asyncio.Task[bytes]] = set()
        self._reader = asyncio.get_running_loop().create_task(self._read())
        # Nothing of a task that is cancelled before its first step runs, not even `finally`.
        self._reader.add_done_callback(lambda _: self._answers.put_nowait(None))

    async def responses(self) -> AsyncIterator[bytes]:
        """The responses, in the order of the requests, until the client sends no more."""
        while (task := await self._answers.get()) is not None:
            yield await task
            self._room.release()
        if not self._reader.cancelled():
            self._reader.result()

    def end(self) -> None:
        """Read no more requests, because the server ends; those that were read are answered."""
        self._reader.cancel()

    async def close(self) -> None:
        """Drop what is not answered, and free the memory."""
        tasks = [self._reader, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._held:
            self._budget.give_for_stream(self._held, self._tenant)
            self._held = 0

    async def _read(self) -> None:
        while await self._room.acquire() and (data := await self._context.read()) is not grpc.aio.EOF:
            size = COPIES * len(data)
            has_room = self._budget.take(size)
            task = asyncio.get_running_loop().create_task(
                self._answer(data, self._context), name="request of a stream"
            )
            del data
            self._tasks.add(task)
            task.add_done_callback(partial(self._free, size if has_room else 0))
            self._answers.put_nowait(task)
            if not has_room:
                # It lives on the memory of the stream, so the next message has to wait.
                await asyncio.wait([task])

    def _free(self, size: int, task: asyncio.Task[bytes]) -> None:
        self._tasks.discard(task)
        self._budget.give(size)


def stream_response(response: bytes) -> bytes:
    """Return the message of a stream with a serialized `ModelInferResponse`."""
    return b"".join((_RESPONSE_TAG, _varint(len(response) + len(_FINAL)), response, _FINAL))


def stream_error(request: bytes, reason: str) -> bytes:
    """Return the message of a stream for a serialized request that has failed, with its id if it has one."""
    fields: dict[str, Any] = {}
    try:
        rest, _ = split_raw(request)
        if len(rest) <= _ID_BYTES:
            parsed = message("ModelInferRequest").FromString(rest)
            fields = {"id": parsed.id, "model_name": parsed.model_name}
    except (InferpoolError, DecodeError):
        pass  # what is no message has no id
    found: bytes = message("ModelStreamInferResponse")(
        error_message=reason or "the request has failed", infer_response=fields
    ).SerializeToString()
    return found


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
