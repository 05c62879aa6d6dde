"""Answers requests for explanations. The routes import this module with the first of them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from inferpool.errors import BodyTooLarge, InferpoolError, InvalidInput, NotFound, QueueFull
from inferpool.http.access.gate import model_forbidden
from inferpool.http.asgi import peer_of
from inferpool.http.explain.explainer import Explainer, Explanation, working_bytes
from inferpool.http.explain.gradients import check_gradients
from inferpool.http.explain.options import ExplainQuery, ExplanationLimits
from inferpool.http.explain.passes import ClientGone, Passes
from inferpool.http.explain.subject import Subject, make_subjects
from inferpool.http.explain.target import Target
from inferpool.http.explain.turns import SharedTurn
from inferpool.http.media_types import JSON_TYPE
from inferpool.http.predict.api import InferenceApi, Options
from inferpool.http.predict.compression import decompress
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.recorder import CLIENT_GONE
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.problems import STATUSES, as_problem
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import LOWEST_PRIORITY, Entry, Result
from inferpool.system.cpu_pace import yield_to_others
from inferpool.tensors import Tensors, check_outputs

MOST_AT_ONCE: Final = 4
"""Explanations that a process makes at a time; each has a thread and the memory of a few batches."""
MOST_ROWS: Final = 16
"""Rows of a request that are explained; they share its passes."""
_RETRY_S: Final = 1.0
_PNG: Final = "image/png"


class Explanations:
    """Answers requests for explanations; for the event loop."""

    def __init__(self, predictor: Predictor, metrics: Metrics, limits: ExplanationLimits) -> None:
        """Each request may take at most what `limits` says."""
        self._predictor = predictor
        self._metrics = metrics
        self._limits = limits
        self._threads = ThreadPoolExecutor(
            MOST_AT_ONCE, thread_name_prefix="explain", initializer=yield_to_others
        )
        self._running = 0
        self._shared = SharedTurn(predictor.clock, self._last_prediction)

    async def answer(
        self, request: Request, api: InferenceApi, query: ExplainQuery, model: str, version: str | None
    ) -> Response:
        """Return the answer to a request; raises what a prediction raises, and NotFound if switched off."""
        scope, predictor = request.scope, self._predictor
        context = PredictContext(api, RequestHead(model, version, scope["headers"]), predictor.clock())
        context.head.came_to(scope["method"].encode("latin-1"), scope["raw_path"])
        context.request_id = scope["state"]["request_id"]
        context.peer = peer_of(scope)
        context.caller = scope["state"]["caller"]
        status, code, size = 200, "ok", 0
        try:
            response = await self._explain(request, context, query)
            size = len(response.body)
        except asyncio.CancelledError:
            status, code = CLIENT_GONE, "disconnected"
            raise
        except (ClientGone, ClientDisconnect):
            status, code = CLIENT_GONE, "disconnected"
            return Response(status_code=503)  # nobody reads it
        except Exception as error:
            problem = as_problem(error)
            status, code = STATUSES[problem.code], problem.code
            raise
        finally:
            try:
                self._count(context, status)
                predictor.record(context, status, code, size)
            finally:
                predictor.budget.release(context)
                context.free()
        return response

    def _last_prediction(self) -> float:
        """Return when this or another process has answered a prediction; infinity while one runs here."""
        if self._predictor.in_flight.accepted > self._running:
            return math.inf
        return self._predictor.resolver.last_success()

    def _count(self, context: PredictContext, status: int) -> None:
        served = context.served
        if served is not None:
            key = served.view.key
            self._metrics.value("explanations_total", key.model, str(key.version), str(status)).add(1.0)

    async def _explain(self, request: Request, context: PredictContext, query: ExplainQuery) -> Response:
        predictor, head = self._predictor, context.head
        assert head.model is not None  # the path has it
        if not context.caller.may_predict(head.model):
            raise model_forbidden(context.caller, head.model)
        if not self._limits.passes:
            raise NotFound("explanations are switched off on this server; see --explain-max-passes")
        most = query.passes_of(self._limits.passes)
        predictor.admit(context)
        self._check_room()
        body = await self._read(request, context)
        subjects = await self._decode(context, body, query)
        # Here, because a body may come slowly, and until it has come it takes no thread.
        self._check_room()
        self._running += 1
        predictor.in_flight.requests += 1
        predictor.in_flight.accepted += 1
        try:
            until = min(
                predictor.deadline(context),
                context.began + self._limits.seconds,
                context.began + (query.budget_ms or math.inf) / 1000,
            )
            served = context.served
            assert served is not None  # `_decode` found it
            predictor.budget.reserve(context, working_bytes(served, subjects, most, query.method))
            made = await self._run(request, context, query, subjects, most, until)
            return await self._encode(request, context, query, made)
        finally:
            self._running -= 1
            predictor.in_flight.release()
            predictor.in_flight.leave()

    def _check_room(self) -> None:
        if self._running >= MOST_AT_ONCE:
            raise QueueFull(
                f"{MOST_AT_ONCE} explanations are being made; try again later", retry_after_s=_RETRY_S
            )

    async def _read(self, request: Request, context: PredictContext) -> bytes:
        predictor, parts, size = self._predictor, list[bytes](), 0
        async for part in request.stream():
            size += len(part)
            if size > predictor.max_body_bytes:
                raise BodyTooLarge(
                    f"the body has more than {predictor.max_body_bytes} bytes, the limit",
                    limit=predictor.max_body_bytes,
                )
            predictor.budget.reserve(context, len(part))
            parts.append(part)
        return b"".join(parts)

    async def _decode(self, context: PredictContext, body: bytes, query: ExplainQuery) -> list[Subject]:
        predictor = self._predictor
        threads = predictor.offloader.begin(context, len(body), context.peer)
        work = asyncio.get_running_loop().run_in_executor(threads, self._open, context, body, query)
        try:
            # A thread that decodes uses the request's share of memory until it is done.
            return await asyncio.shield(work)
        finally:
            if not work.done():
                await asyncio.wait([work])
            predictor.decoded(context)
            context.input_bytes = 0  # from here on the request stands for its passes, each with its own bytes

    def _open(self, context: PredictContext, body: bytes, query: ExplainQuery) -> list[Subject]:
        """Decode a body, in a thread, as `Predictor.decode` does, and divide its rows into features."""
        predictor, head, served = self._predictor, context.head, context.served
        assert served is not None  # `admit` found it
        allowance = predictor.allowance(context)
        plain = decompress(body, head.content_encoding, allowance) if head.content_encoding else body
        opened = context.api.open(head, plain, allowance)
        options = opened.options
        if options.model not in (None, head.model) or (
            head.version is not None and options.version not in (None, head.version)
        ):
            raise InvalidInput(
                "the body names another model or version than the path; name it in one of the two only",
                field="model",
            )
        if options.version is not None and head.version is None and head.model is not None:
            served = context.served = predictor.resolver.find(head.model, options.version, context)
        tensors = opened.tensors(served)
        context.input_bytes = sum(tensor.nbytes for tensor in tensors.values())
        rows = _rows_of(served, tensors)
        if not 1 <= rows <= MOST_ROWS:
            raise InvalidInput(f"the request has {rows} rows; 1 to {MOST_ROWS} are explained at a time")
        if served.view.text is not None and served.view.text.input not in tensors:
            served.view.text.check(tensors)
        if options.outputs is not None:
            check_outputs(served.signature, options.outputs)
        target = Target(served, query, options.outputs)
        check_gradients(served, target, query)
        # The passes run behind all predictions, and give only the output that is explained.
        context.options = Options(
            id=options.id, outputs=(target.output,), timeout_ms=options.timeout_ms, priority=LOWEST_PRIORITY
        )
        return make_subjects(served, tensors, opened.columns, query)

    async def _run(
        self,
        request: Request,
        context: PredictContext,
        query: ExplainQuery,
        subjects: list[Subject],
        most: int,
        until: float,
    ) -> list[Explanation]:
        loop, predictor, served = asyncio.get_running_loop(), self._predictor, context.served
        assert served is not None  # `_decode` found it
        key = served.view.key
        ran = self._metrics.value("explain_passes_total", key.model, str(key.version))

        def on_result(entry: Entry, result: Result) -> None:
            ran.add(entry.rows)
            if context.tenant is not None:
                context.tenant.used(entry.rows, result)

        passes = Passes(predictor, context, loop, self._shared, on_result)
        explainer = Explainer(served, query, context.options.outputs, passes, predictor.clock)
        work = loop.run_in_executor(self._threads, explainer.explain, subjects, most, until)
        watch = asyncio.create_task(_disconnected(request))
        try:
            ends: tuple[asyncio.Future[Any], ...] = (work, watch)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                passes.abandon()
                # The thread uses the request's share of memory until it has noticed.
                await asyncio.wait([work])
        return await work

    async def _encode(
        self, request: Request, context: PredictContext, query: ExplainQuery, made: list[Explanation]
    ) -> Response:
        served = context.served
        assert served is not None  # `_decode` found it
        if _PNG in request.headers.get("accept", "") and len(made) == 1 and made[0].picture is not None:
            png = await asyncio.get_running_loop().run_in_executor(self._threads, made[0].picture)
            return Response(png, media_type=_PNG)
        document = {
            "model": served.view.key.model,
            "version": served.version,
            "id": context.options.id or context.request_id,
            "seed": query.seed,
            "explanations": [each.document for each in made],
        }
        return Response(orjson.dumps(document), media_type=JSON_TYPE)


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    with contextlib.suppress(InferpoolError):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _rows_of(served: ServedVersion, tensors: Tensors) -> int:
    """Return how many rows a request has that are explained one by one."""
    if served.view.text is not None and served.view.text.input in tensors:
        return len(tensors[served.view.text.input])
    return served.rows(tensors) if served.view.batching.enabled else 1
