"""The calls of the protocol. Each is passed on to a web process as a request of `/v2`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

import grpc
import orjson
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from inferpool.errors import BodyTooLarge, InferpoolError, InternalError, MalformedBody, Overloaded
from inferpool.grpc_api.client_line import ClientLines
from inferpool.grpc_api.message_budget import MessageBudget, ReceivedMessage
from inferpool.grpc_api.messages import message
from inferpool.grpc_api.request_stream import RequestStream, stream_error, stream_response
from inferpool.grpc_api.rest_client import Part, RestAnswer, RestClient
from inferpool.grpc_api.translation import model_path, to_message, to_rest
from inferpool.grpc_api.wire_format import split_raw
from inferpool.http.connection.forwarded import TENANT
from inferpool.http.problems import GRPC_STATUSES, problem_headers

log = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Call: TypeAlias = Callable[[bytes, Context], Awaitable[bytes]]

PARSED_COPIES: Final = 16
"""How many times its own size a message of many small members takes once it is parsed."""
MOST_SMALL_BYTES: Final = 64 * 1024
"""Size of the largest message of a call that does not infer."""
_LARGE_BYTES: Final = 256 * 1024
"""Typed contents of more bytes are translated in a thread, so that other calls go on."""
_PASSED_ON: Final = frozenset({"authorization", "x-api-key", "x-request-id", "traceparent", "tracestate"})
"""Metadata that become headers of the request."""
_KEYS: Final = frozenset({"authorization", "x-api-key"})
_RETURNED: Final = (b"x-request-id", b"server-timing", b"retry-after")
"""Headers of the response that become metadata behind it."""
_EXTENSIONS: Final = (
    *("classification", "model_configuration", "model_repository", "parameters", "schedule_policy"),
    "statistics",
)
"""The extensions of `/v2` that are here, too."""
_LONGEST_S: Final = 10_000_000.0
"""A longer deadline is none."""
_OK: Final = 200
_NOT_FOUND: Final = 404
_NO_ROUTE: Final = "/v2/streams"
"""A path without a route, for which any key will do."""


class Service:
    """Answers the calls of `inference.GRPCInferenceService`."""

    def __init__(
        self,
        web: RestClient,
        budget: MessageBudget,
        lines: ClientLines,
        *,
        needs_key: bool,
        has_tenants: bool = False,
    ) -> None:
        """`needs_key` says that a request without a key is surely refused.

        `has_tenants` says that the server has keys, so that requests belong to tenants.
        """
        self._web = web
        self._budget = budget
        self._lines = lines
        self._needs_key = needs_key
        self._has_tenants = has_tenants or needs_key
        self._streams: set[RequestStream] = set()

    def end_streams(self) -> None:
        """Read no more requests from streams, because the server ends."""
        for stream in self._streams:
            stream.end()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handler of each call."""
        calls: dict[str, Call] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.repository_model_load,
            "RepositoryModelUnload": self.repository_model_unload,
        }
        return {
            "ModelInfer": self.unary(self.model_infer, infers=True),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.model_stream_infer),
            **{name: self.unary(call) for name, call in calls.items()},
        }

    def unary(self, call: Call, *, infers: bool = False) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a handler that reads one message within the budget, and answers it by `call`.

        On the wire, a call with one message is the same as a stream of one message. Of a stream, the server
        decides itself when to read. Calls that do not infer have small messages.
        """
        asks_key = infers and self._needs_key

        async def answer(_: Any, context: Context) -> bytes:
            try:
                if asks_key and not _has_key(context):
                    raise await self._refusal_without_key(context)
                received = ReceivedMessage(self._budget)
                try:
                    data = await received.read(context.read)
                    if data is grpc.aio.EOF:
                        raise MalformedBody("the call has no message; send one")
                    if not infers and len(data) > MOST_SMALL_BYTES:
                        raise BodyTooLarge(
                            f"the message has {len(data)} bytes; this call takes {MOST_SMALL_BYTES}"
                        )
                    return await call(data, context)
                finally:
                    received.close()
            except InferpoolError as error:
                await abort(context, error)
            except MemoryError:
                await abort(context, Overloaded("memory ran out while the request was translated"))
            except Exception as error:
                if isinstance(error, grpc.aio.AbortError | grpc.aio.BaseError):
                    raise
                log.exception("a call of gRPC has failed")
                await abort(context, InternalError("the server failed on this call; its log has the cause"))
            raise AssertionError("abort raises")

        return grpc.stream_unary_rpc_method_handler(answer)

    async def model_infer(self, data: bytes, context: Context) -> bytes:
        """Infer."""
        rest, raw = split_raw(data)
        parsed_bytes = PARSED_COPIES * len(rest)
        if not self._budget.could_take(parsed_bytes):
            raise BodyTooLarge(
                f"the message has {len(rest)} bytes beside raw contents, which would take more memory than"
                ' requests may hold; send "raw_input_contents"'
            )
        if not self._budget.take(parsed_bytes):
            raise Overloaded("the server has no room for another large message; try again later")
        try:
            request = parse("ModelInferRequest", rest)
            if len(rest) > _LARGE_BYTES:
                translated = await asyncio.to_thread(to_rest, request, raw)
            else:
                translated = to_rest(request, raw)
            del request
        finally:
            self._budget.give(parsed_bytes)
        headers = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n" % (
            translated.header_length
        )
        answer = await self.ask(context, "POST", translated.path, headers, translated.parts)
        header_length = int(answer.headers[b"inference-header-content-length"])
        if not translated.raw_outputs and len(answer.body) > _LARGE_BYTES:
            return await asyncio.to_thread(to_message, answer.body, header_length, raw=False)
        return to_message(answer.body, header_length, raw=translated.raw_outputs)

    async def model_stream_infer(self, _: Any, context: Context) -> AsyncIterator[bytes]:
        """Infer each message of a stream; the responses come in the order of the requests."""
        try:
            if self._needs_key and not _has_key(context):
                raise await self._refusal_without_key(context)
            tenant = await self._find_tenant(context) if self._has_tenants else None
            stream = RequestStream(self._budget, context, self._stream_answer, tenant)
        except InferpoolError as error:
            await abort(context, error)
            raise AssertionError("abort raises") from None
        self._streams.add(stream)
        try:
            async for response in stream.responses():
                yield response
        finally:
            self._streams.discard(stream)
            await stream.close()

    async def _stream_answer(self, data: bytes, context: Context) -> bytes:
        """Return the response to one message of a stream, which has the error if there is one."""
        try:
            return stream_response(await self.model_infer(data, context))
        except InferpoolError as error:
            return stream_error(data, error.detail)
        except MemoryError:
            return stream_error(data, "memory ran out while the request was translated")
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError | grpc.aio.BaseError):
                raise
            log.exception("a request in a stream of gRPC has failed")
            return stream_error(data, "the server failed on this request; its log has the cause")

    async def server_live(self, data: bytes, context: Context) -> bytes:
        """Whether the server answers."""
        status = await self.status(context, "/v2/health/live")
        return serialized("ServerLiveResponse", live=status == _OK)

    async def server_ready(self, data: bytes, context: Context) -> bytes:
        """Whether every required model can answer."""
        status = await self.status(context, "/v2/health/ready")
        return serialized("ServerReadyResponse", ready=status == _OK)

    async def model_ready(self, data: bytes, context: Context) -> bytes:
        """Whether a model can answer."""
        request = parse("ModelReadyRequest", data)
        status = await self.status(context, model_path(request.name, request.version, "/ready"))
        return serialized("ModelReadyResponse", ready=status == _OK)

    async def server_metadata(self, data: bytes, context: Context) -> bytes:
        """The server and its extensions."""
        fields = orjson.loads((await self.ask(context, "GET", "/v2")).body)
        fields["extensions"] = [name for name in fields["extensions"] if name in _EXTENSIONS]
        return from_json("ServerMetadataResponse", fields)

    async def model_metadata(self, data: bytes, context: Context) -> bytes:
        """The inputs and outputs of a model."""
        request = parse("ModelMetadataRequest", data)
        answer = await self.ask(context, "GET", model_path(request.name, request.version, ""))
        return from_json("ModelMetadataResponse", orjson.loads(answer.body))

    async def model_config(self, data: bytes, context: Context) -> bytes:
        """The configuration of a model, in Triton's form."""
        request = parse("ModelConfigRequest", data)
        answer = await self.ask(context, "GET", model_path(request.name, request.version, "/config"))
        return from_json("ModelConfigResponse", {"config": orjson.loads(answer.body)})

    async def model_statistics(self, data: bytes, context: Context) -> bytes:
        """Statistics of the versions of a model, or of all models if the call names none."""
        request = parse("ModelStatisticsRequest", data)
        path = model_path(request.name, request.version, "/stats") if request.name else "/v2/models/stats"
        answer = await self.ask(context, "GET", path)
        return from_json("ModelStatisticsResponse", orjson.loads(answer.body))

    async def repository_index(self, data: bytes, context: Context) -> bytes:
        """Every version in the repository, and its state."""
        request = parse("RepositoryIndexRequest", data)
        body = orjson.dumps({"ready": request.ready})
        answer = await self.ask(context, "POST", "/v2/repository/index", parts=[body])
        return from_json("RepositoryIndexResponse", {"models": orjson.loads(answer.body)})

    async def repository_model_load(self, data: bytes, context: Context) -> bytes:
        """Load a model."""
        return await self._change(data, context, "Load")

    async def repository_model_unload(self, data: bytes, context: Context) -> bytes:
        """Unload a model."""
        return await self._change(data, context, "Unload")

    async def _change(self, data: bytes, context: Context, act: str) -> bytes:
        request = parse(f"RepositoryModel{act}Request", data)
        # `/v2` refuses parameters of a load. Triton's client sends one with an unload, which is ignored.
        names = list(request.parameters)[:1] if act == "Load" else []
        body = orjson.dumps({"parameters": dict.fromkeys(names)})
        path = model_path(request.model_name, "", f"/{act.lower()}").replace("/v2/", "/v2/repository/", 1)
        await self.ask(context, "POST", path, parts=[body])
        return serialized(f"RepositoryModel{act}Response")

    async def status(self, context: Context, path: str) -> int:
        """Return the status of a GET request that says whether something is ready: 200 or 503.

        Raises InferpoolError if it is another one.
        """
        try:
            return (await self.ask(context, "GET", path)).status
        except RestError as error:
            if error.status == 503:
                return error.status
            raise

    async def ask(
        self,
        context: Context,
        method: str,
        path: str,
        headers: bytes = b"",
        parts: Sequence[Part] = (),
    ) -> RestAnswer:
        """Send a request of the caller, and return its response, whose metadata the caller gets.

        Raises RestError if the response is an error.
        """
        left_s = context.time_remaining()
        if left_s is not None and left_s < _LONGEST_S:
            headers += b"x-timeout-ms: %.3f\r\n" % max(0.001, 1000 * left_s)
        size = sum(map(len, parts))
        head = b"%b %b HTTP/1.1\r\nhost: grpc\r\n%bcontent-length: %d\r\n%b\r\n" % (
            method.encode(),
            path.encode(),
            _passed_on(context),
            size,
            headers,
        )
        answer = await self._web.ask(self._lines.of(context), head, parts)
        metadata = [
            (name.decode(), answer.headers[name].decode("latin-1"))
            for name in _RETURNED
            if name in answer.headers
        ]
        if answer.status != _OK:
            raise RestError(answer, metadata)
        context.set_trailing_metadata(tuple(metadata))
        return answer

    async def _find_tenant(self, context: Context) -> str:
        """Return the tenant of a call, "" for one without a key.

        Raises the refusal of a wrong key: a stream holds memory before it has messages.
        """
        try:
            await self.ask(context, "GET", _NO_ROUTE)
        except RestError as error:
            if error.status == _NOT_FOUND:
                return error.tenant
            if self._needs_key or _has_key(context):
                raise
        return ""

    async def _refusal_without_key(self, context: Context) -> InferpoolError:
        """Let a web process refuse and count a request without a key, whose message is not read."""
        try:
            await self.ask(context, "POST", "/v2/models/unknown/infer")
        except RestError as error:
            return error
        return InternalError("a request without a key was not refused")


class RestError(InferpoolError):
    """An error that a web process has answered.

    Attributes:
        status: the status of HTTP.
        metadata: what the client gets with the error.
        tenant: whose request it was; "" if the web process does not say.
    """

    def __init__(self, answer: RestAnswer, metadata: list[tuple[str, str]]) -> None:
        """Read the error's object in the body of `answer`."""
        try:
            fields = orjson.loads(answer.body)
            detail, code = str(fields.get("error")), str(fields.get("code"))
        except (orjson.JSONDecodeError, AttributeError):
            detail, code = "the server failed on this call", InternalError.code
        super().__init__(detail)
        self.code = code  # type: ignore[misc]
        self.status = answer.status
        self.metadata = metadata
        self.tenant = unquote(answer.headers.get(TENANT, b"").decode("latin-1"))


async def abort(context: Context, error: InferpoolError) -> None:
    """End a call with the status of `error`. Raises AbortError, which ends the handler."""
    metadata: list[tuple[str, str]] = []
    if isinstance(error, RestError):
        metadata = error.metadata
    else:
        metadata = [(name.decode(), value.decode()) for name, value in problem_headers(error)]
    metadata.append(("code", error.code))
    retry_after = dict(metadata).get("retry-after")
    if retry_after is not None and retry_after.isdigit():
        # Clients of gRPC that have a policy for retries wait so long.
        metadata.append(("grpc-retry-pushback-ms", str(1000 * int(retry_after))))
    status = grpc.StatusCode[GRPC_STATUSES.get(error.code, "INTERNAL")]
    await context.abort(status, error.detail, tuple(metadata))


def parse(name: str, data: bytes) -> Any:
    """Return the message `name` in `data`. Raises MalformedBody."""
    try:
        return message(name).FromString(data)
    except DecodeError as error:
        raise MalformedBody(f"the message is no {name}, or damaged") from error


def serialized(kind: str, /, **fields: Any) -> bytes:
    """Return the message `kind` with `fields`, serialized."""
    found: bytes = message(kind)(**fields).SerializeToString()
    return found


def from_json(kind: str, fields: Any) -> bytes:
    """Return the message `kind` with those of the `fields` of `/v2` that it has, serialized."""
    found: bytes = ParseDict(fields, message(kind)(), ignore_unknown_fields=True).SerializeToString()
    return found


def _has_key(context: Context) -> bool:
    return any(name in _KEYS for name, _ in context.invocation_metadata() or ())


def _passed_on(context: Context) -> bytes:
    """Return the metadata of a call that become headers. Values that HTTP cannot have are left out."""
    lines = b""
    for name, value in context.invocation_metadata() or ():
        if name in _PASSED_ON:
            text = value if isinstance(value, str) else value.decode("latin-1")
            if text.isascii() and text.isprintable():
                lines += b"%b: %b\r\n" % (name.encode(), text.encode())
    return lines
