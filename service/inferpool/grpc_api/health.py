"""The standard health service of gRPC, for the server and for each model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2

from inferpool.errors import InferpoolError, NotFound, Overloaded
from inferpool.grpc_api.message_budget import MessageBudget, ReceivedMessage
from inferpool.grpc_api.messages import HEALTH_SERVICE, SERVICE
from inferpool.grpc_api.service import Context, Service, abort
from inferpool.grpc_api.translation import model_path

MOST_WATCHES: Final = 64
"""Calls that watch at once. Each asks a web process every second."""
LOOK_S: Final = 1.0
_OK: Final = 200
_NOT_FOUND: Final = ("not_found", "model_not_found", "version_not_found")
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Answers the calls of `grpc.health.v1.Health`.

    The service "" is the server, and so are the names of the services of gRPC; every other name is a model's.
    """

    def __init__(self, service: Service, budget: MessageBudget) -> None:
        self._service = service
        self._budget = budget
        self._watches = 0
        self._ending = asyncio.Event()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handler of each call."""
        return {
            "Check": self._service.unary(self.check),
            "Watch": grpc.stream_stream_rpc_method_handler(self.watch),
        }

    def end(self) -> None:
        """End the calls that watch, because the server ends."""
        self._ending.set()

    async def check(self, data: bytes, context: Context) -> bytes:
        """The state of the server or of a model."""
        name = _name_in(data)
        state = await self._look(name, context)
        if state == _UNKNOWN:
            raise NotFound(f'there is no model "{name[:200]}"')
        return _response(state)

    async def watch(self, _: Any, context: Context) -> AsyncIterator[bytes]:
        """Each change of the state, and the state at first."""
        if self._watches >= MOST_WATCHES:
            await abort(context, Overloaded(f"{MOST_WATCHES} calls watch already; ask by Check"))
        self._watches += 1
        try:
            received = ReceivedMessage(self._budget)
            try:
                name = _name_in(await received.read(context.read))
            finally:
                received.close()
            last = None
            while not self._ending.is_set():
                state = await self._look(name, context)
                if state != last:
                    yield _response(state)
                last = state
                try:
                    await asyncio.wait_for(self._ending.wait(), LOOK_S)
                except TimeoutError:
                    continue
            yield _response(_NOT_SERVING)
        except InferpoolError as error:
            await abort(context, error)
        finally:
            self._watches -= 1

    async def _look(self, name: str, context: Context) -> Any:
        path = "/v2/health/ready" if name in ("", SERVICE, HEALTH_SERVICE) else model_path(name, "", "/ready")
        try:
            status = await self._service.status(context, path)
        except InferpoolError as error:
            if error.code in _NOT_FOUND:
                return _UNKNOWN
            raise
        return _SERVING if status == _OK else _NOT_SERVING


def _name_in(data: bytes) -> str:
    name: str = health_pb2.HealthCheckRequest.FromString(data).service
    return name


def _response(state: Any) -> bytes:
    data: bytes = health_pb2.HealthCheckResponse(status=state).SerializeToString()
    return data
