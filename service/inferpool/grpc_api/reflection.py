"""Reflection: tools such as grpcurl ask the server for the protocol itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from inferpool.errors import InferpoolError, Overloaded
from inferpool.grpc_api.message_budget import MessageBudget, ReceivedMessage
from inferpool.grpc_api.messages import HEALTH_SERVICE, POOL, REFLECTION_SERVICE, SERVICE
from inferpool.grpc_api.service import Context, abort

MOST_STREAMS: Final = 8
"""Streams at once. They end after a minute without a message."""


class Reflection:
    """Answers the call of `grpc.reflection.v1alpha.ServerReflection`."""

    def __init__(self, budget: MessageBudget) -> None:
        self._budget = budget
        self._streams = 0
        self._servicer = ReflectionServicer((SERVICE, HEALTH_SERVICE, REFLECTION_SERVICE), pool=POOL)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handler of the call."""
        return {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self.info)}

    async def info(self, _: Any, context: Context) -> AsyncIterator[bytes]:
        """Answer each question of the stream."""
        if self._streams >= MOST_STREAMS:
            await abort(context, Overloaded(f"{MOST_STREAMS} calls use reflection already; try again later"))
        self._streams += 1
        try:
            async for response in self._servicer.ServerReflectionInfo(self._questions(context), context):
                yield response.SerializeToString()
        except InferpoolError as error:
            await abort(context, error)
        finally:
            self._streams -= 1

    async def _questions(self, context: Context) -> AsyncIterator[Any]:
        while True:
            received = ReceivedMessage(self._budget)
            try:
                data = await received.read(context.read)
            finally:
                received.close()
            if data is grpc.aio.EOF:
                return
            yield reflection_pb2.ServerReflectionRequest.FromString(data)
