"""One prediction, whatever its API: a body is decoded, its entry submitted, and the result encoded.

This is plain code: it waits for nothing, starts no task and no thread, and knows no connection. The caller
does:

    predictor.admit(context)                       before the body is read
    tensors = predictor.decode(context, body)      in any thread
    predictor.submit(context, tensors, then)       `then` is called with the result
    predictor.land(context, result)                if it `leads` equal requests
    response = predictor.encode(context, result)   or `refuse(context, error)` for an error
                                                   or, if `large_answers.weigh` names threads for it,
    answer = predictor.large_answers.encode(…)     in one of them, and `respond` on the event loop
    predictor.release(context)                     once the response is written
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import Final

from inferpool.allowance import Allowance
from inferpool.errors import (
    DeadlineExceeded,
    Draining,
    Forbidden,
    InferpoolError,
    InternalError,
    InvalidInput,
    NotReady,
    Unauthorized,
)
from inferpool.http.access.gate import model_forbidden
from inferpool.http.access.tenants import Tenants
from inferpool.http.predict.api import Data, Encoded
from inferpool.http.predict.body_buffer import too_large
from inferpool.http.predict.budget import BodyAllowance, ByteBudget
from inferpool.http.predict.compression import decompress
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.in_flight import InFlight
from inferpool.http.predict.large_answers import EncodedAnswer, LargeAnswers
from inferpool.http.predict.observations import Observations
from inferpool.http.predict.offload import COUNTED_ANSWER_BYTES, DecodeOffloader
from inferpool.http.predict.picture_urls import PictureUrls
from inferpool.http.predict.recorder import CLIENT_GONE, RequestRecorder
from inferpool.http.predict.resolver import Resolver
from inferpool.http.predict.response import Response, server_timing
from inferpool.http.predict.response_cache import ResponseCache
from inferpool.http.predict.results import ResultDispatcher
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.predict.shadow_copies import ShadowCopies
from inferpool.http.predict.single_flight import SingleFlight
from inferpool.http.problems import STATUSES, as_problem, problem_headers
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import DEFAULT_PRIORITY, Entry, Inbox, Part, Result, VersionKey
from inferpool.pool.splitting import split_entry
from inferpool.repository.catalog import Catalog
from inferpool.tensors import Array, Tensors, check_outputs

log = logging.getLogger(__name__)

_MIN_GZIP_BYTES: Final = 1024
"""Smaller responses fit into one or two packets uncompressed."""
MOST_REFERRED_BYTES: Final = 32 * 1024
"""Larger inputs are observed before they run. They may lie in memory that an engine shares (`lent_bodies`),
and that memory is used for others once the result has come."""


class Predictor:
    """Turns requests into entries and results into responses.

    `decode` may run in any thread, everything else runs on the event loop.

    Attributes:
        clock: seconds of the clock that deadlines and times are measured with.
        max_body_bytes: size of the largest body that is accepted.
        budget: the bytes that all requests hold.
        in_flight: how many requests there are.
        offloader: decides which bodies are decoded in a background thread.
        large_answers: counts the bytes of large answers, and encodes them.
        resolver: finds versions.
        tenants: to whom keys belong; None while the server has no keys.
    """

    def __init__(
        self,
        catalog: Catalog,
        inbox: Inbox,
        results: ResultDispatcher,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        max_body_bytes: int,
        in_flight_bytes: int,
        recorder: RequestRecorder,
        release: Callable[[VersionKey, int], None] | None = None,
        lend: Callable[[VersionKey, int, int], memoryview | None] | None = None,
        cache: ResponseCache | None = None,
        observations: Observations | None = None,
    ) -> None:
        """`release` is called with the version and the id of an entry when nobody reads its outputs any more.

        None if outputs are arrays of this process.

        `lend` returns memory for a body of a version, of so many bytes, whose tensors begin at some byte: an
        engine finds them there without a copy. None if no engine is another process.

        `cache` keeps the outputs of models whose answers are cached, and `observations` samples and counts.
        """
        self.clock = clock
        self.max_body_bytes = max_body_bytes
        self.budget = ByteBudget(in_flight_bytes)
        self._small_body = Allowance(max_body_bytes)
        self._pictures: PictureUrls | None = None
        self.in_flight = InFlight()
        self.offloader = DecodeOffloader(catalog)
        self.resolver = Resolver(catalog, metrics, cache, observations)
        self.tenants: Tenants | None = None
        self._inbox = inbox
        self._release_outputs = release
        self._lend = lend
        # Whether outputs may be views of memory that is used for others after `release`.
        self.lends_outputs = release is not None
        self.large_answers = LargeAnswers(
            self.budget, self.offloader, clock, lends_outputs=release is not None
        )
        self._results = results
        self._recorder = recorder
        self._entry_ids = itertools.count(1)
        self._copies = ShadowCopies(inbox, results, clock, self._entry_ids, release)
        self._flights = SingleFlight(inbox, results, clock, release)
        in_flight = self.in_flight
        metrics.add_source(lambda: [("in_flight_requests", (), float(in_flight.requests))])

    def admit(self, context: PredictContext, received: int = 0) -> None:
        """Refuse a request before its body is read if it would be refused whatever the body holds.

        The `received` bytes of a body that is complete are reserved; other bodies only need room.

        Raises ModelNotFound, VersionNotFound, BodyTooLarge, RateLimited, QueueFull, NotReady, Overloaded or
        Draining.
        """
        if self.tenants is not None:
            context.tenant = self.tenants.of(context.caller.tenant)
            context.tenant.admit(self.clock)
        if self.in_flight.draining:
            raise Draining("the server is shutting down; send the request to another server")
        head = context.head
        length = head.content_length or 0
        if length > self.max_body_bytes:
            raise too_large(self.max_body_bytes)
        if head.model is not None:
            served = context.served = self.resolver.find(head.model, head.version, context)
            tenant = 0 if context.tenant is None else context.tenant.number
            self._inbox.refuse_early(served.view.key, tenant)
        if received:
            self.budget.reserve(context, received)
        else:
            self.budget.check(length)

    def lend_body(self, context: PredictContext) -> memoryview | None:
        """Return memory for the whole body in which the engine of its version can read its tensors.

        None if the body is small, holds no tensors in binary form, or names its version only inside.
        """
        head, served = context.head, context.served
        length = head.content_length
        if self._lend is None or served is None or length is None or head.content_encoding:
            return None
        tensors_at = context.api.tensors_at(head)
        return None if tensors_at < 0 else self._lend(served.view.key, length, tensors_at)

    def decode(self, context: PredictContext, data: Data) -> Tensors:
        """Return the inputs of a request, validated, and find the version that the request means.

        Raises every RequestError there is but Unauthorized, and NotReady.
        """
        if context.abandoned:
            raise InferpoolError("the client is gone or has been refused")
        began = self.clock()
        head = context.head
        allowance = self._small_body if not context.offloaded_bytes else self.allowance(context)
        plain = decompress(data, head.content_encoding, allowance) if head.content_encoding else data
        body = context.api.open(head, plain, allowance)
        options = context.options = body.options
        if head.model is None or (head.version is None and options.version is not None):
            model = head.model or self.resolver.model_named(options.model, context.caller.models)
            if not context.caller.may_predict(model):
                raise model_forbidden(context.caller, model)
            context.served = self.resolver.find(model, options.version, context)
        elif options.model not in (None, head.model) or options.version not in (None, head.version):
            raise InvalidInput(
                "the body names another model or version than the path; name it in one of the two only",
                field="model",
            )
        served = context.served
        assert served is not None  # `admit` found it if the path names it
        tensors = body.tensors(served)
        if options.outputs is not None:
            check_outputs(served.signature, options.outputs)
        text = served.view.text
        if body.texts:
            context.texts = body.texts
            tensors = body.texts[0].tensors
        elif text is not None:
            if text.input in tensors:
                if served.observer is not None:
                    served.observer.keep_text(context, tensors[text.input])
                context.texts = text.encode(tensors[text.input], apart=not served.view.batching.enabled)
                tensors = context.texts[0].tensors
            else:
                text.check(tensors)
        if context.offloaded_bytes:
            # Counted here, because a tensor may have a million strings, too many for the event loop.
            parts = [rows.tensors for rows in context.texts] or [tensors]
            context.input_bytes = sum(_bytes_of(tensor) for part in parts for tensor in part.values())
        if served.cache is not None:
            apart = [(rows.indices, rows.tensors) for rows in context.texts] if context.texts else ()
            context.cache_key = served.cache.key(
                context.caller.tenant, options.outputs, tensors, apart, on_loop=not context.offloaded_bytes
            )
        context.decode_s = self.clock() - began
        return tensors

    def decoded(self, context: PredictContext) -> None:
        """Take note that a thread has decoded the body, or failed to: only the tensors take memory now."""
        self.offloader.end(context)
        self.budget.settle_decoded(context, context.input_bytes)

    def submit(
        self, context: PredictContext, tensors: Tensors, then: Callable[[Result], None], client: str = ""
    ) -> float:
        """Put the request in the queue and return its deadline, infinity if it has none.

        `then` is called once with the result, on the event loop, unless `abandon` is called before. A large
        answer is counted for `client`, its address.

        Raises InvalidInput, RateLimited, QueueFull, DeadlineExceeded, NotReady, Overloaded or Draining.
        """
        served = context.served
        assert served is not None  # `decode` found it
        deadline = self.deadline(context)
        now = self.clock()
        entry = self._entry(context, tensors, now, deadline)
        if len(context.texts) > 1:
            parts = [
                Part(self._entry(context, rows.tensors, now, deadline), rows.indices)
                for rows in context.texts
            ]
            entry = split_entry(next(self._entry_ids), parts)
        if served.open_answer or entry.rows * served.row_answer_bytes > COUNTED_ANSWER_BYTES:
            self.large_answers.reserve(context, served, tensors, entry.rows, client)
        cache = None if context.cache_key is None or not entry.rows else served.cache
        if cache is not None and deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request was queued")
        if context.tenant is not None:
            context.tenant.take_rows(entry.rows, now)
        on_result = then
        if served.observer is not None and entry.rows:
            if entry.nbytes > MOST_REFERRED_BYTES:
                self._begin_observation(context, tensors)
            else:
                context.observed = tensors
        try:
            if cache is not None and self._flights.join(cache, context, entry, then):
                context.entry = entry
                self.in_flight.accepted += 1
                return deadline
            if served.shadow is not None and entry.rows:
                on_result = self._copies.follow(
                    served.shadow, entry.id, tensors, list(context.texts), context.options.outputs, then
                )
            self._results.subscribe(entry.id, on_result)
            if entry.rows:
                self._inbox.offer(entry)
            else:
                self._answer_no_rows(served, entry)
        except NotReady:
            self._results.unsubscribe(entry.id)
            if cache is not None:
                self._flights.withdraw(cache, context)
            if not self._follow(context):
                raise
            context.cache_key = None  # it is a key of the other version
            context.observation = context.observed = None
            return self.submit(context, tensors, then, client)
        except BaseException:
            self._results.unsubscribe(entry.id)
            if cache is not None:
                self._flights.withdraw(cache, context)
            if context.tenant is not None:
                context.tenant.give_rows_back(entry.rows)
            raise
        context.entry = entry
        if cache is not None:
            self._flights.lead(cache, context)
        self.in_flight.accepted += 1
        return deadline

    def _follow(self, context: PredictContext) -> bool:
        """Let another version answer if the one that was found has been unloaded since.

        False if the request names no other version now, or if what was decoded is not for that version.
        Raises NotReady if what it names is not ready.
        """
        before, head = context.served, context.head
        assert before is not None  # `decode` found it
        version = head.version if head.version is not None else context.options.version
        served = self.resolver.find(before.view.key.model, version)
        one, other = before.view, served.view
        if one.key == other.key or one.signature != other.signature or one.text or other.text or other.image:
            return False
        if context.answer_bytes:
            self.budget.shrink_answer(context, 0)
        context.served = served
        return True

    def _answer_no_rows(self, served: ServedVersion, entry: Entry) -> None:
        """Answer an entry without rows, for which no model has to run."""
        outputs = served.empty_answer(entry.inputs, entry.outputs)
        if outputs is None:
            self._inbox.offer(entry)
        else:
            self._results.put([Result(entry.id, outputs, None, 0.0)])

    def land(self, context: PredictContext, result: Result) -> None:
        """Let equal requests have the result of a request that `leads`; call this before `encode`."""
        self._flights.land(context, result)

    def encode(self, context: PredictContext, result: Result) -> Response:
        """Return the response for a result, which has outputs or an error."""
        served, entry = context.served, context.entry
        if result.error is not None or result.outputs is None or served is None or entry is None:
            return self.refuse(context, result.error or InternalError("the model returned nothing"), result)
        began = self.clock()
        try:
            encoded = context.api.encode(
                context.head, context.options, context.request_id, served, result.outputs
            )
        except Exception as error:  # noqa: BLE001 - outputs that cannot be encoded fail this request alone
            return self.refuse(context, error, result)
        now = self.clock()
        return self._respond(context, served, entry, result, encoded, now - began, now)

    def respond(self, context: PredictContext, answer: EncodedAnswer) -> Response:
        """Return the response for an answer that a thread has encoded."""
        served, entry, encoded = context.served, context.entry, answer.encoded
        if encoded is None or served is None or entry is None:
            return self.refuse(context, answer.error or InternalError("no answer was made"), answer.result)
        response = self._respond(
            context, served, entry, answer.result, encoded, answer.encode_s, self.clock()
        )
        response.compressible = False
        self.budget.shrink_answer(context, response.size)
        return response

    def _respond(
        self,
        context: PredictContext,
        served: ServedVersion,
        entry: Entry,
        result: Result,
        encoded: Encoded,
        encode_s: float,
        now: float,
    ) -> Response:
        head = context.head
        total_s = now - context.began
        headers = [
            *encoded.headers,
            (b"x-request-id", context.request_id.encode("latin-1")),
            (b"server-timing", server_timing(result.queue_s, result.compute_s, total_s)),
        ]
        parts = encoded.parts
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        compressible = size >= _MIN_GZIP_BYTES and head.accepts_gzip()
        # An exception above makes the request an error. Nothing below raises, so a request is counted once.
        if context.tenant is not None:
            context.tenant.succeeded(entry.rows, result)
        served.metrics.succeeded(entry.rows, context.decode_s, encode_s, total_s, now, result)
        if served.observer is not None:
            # For `release`. A client that has its answer and deletes its sample must find that the sample is
            # older, so the moment is taken here.
            context.outputs = result.outputs
            context.ended = time.time()
        if self._recorder.follows_all or head.trace is not None:
            self._recorder.ended(context, 200, "ok", size, now, result)
        return Response(200, headers, parts, size, compressible)

    def _begin_observation(self, context: PredictContext, tensors: Tensors) -> None:
        """Observe a request if it is due; a fault leaves the request unobserved, and it runs all the same."""
        served = context.served
        assert served is not None  # it has an observer
        try:
            served.observer.begin(context, tensors, self.clock())
        except Exception:
            context.observation = None
            log.exception("request %s could not be observed", context.request_id)

    def _observe(self, context: PredictContext, outputs: Tensors) -> None:
        """Copy what is needed of a request that was answered, if it is to be observed."""
        served, inputs = context.served, context.observed
        assert served is not None  # it has an observer
        context.outputs = context.observed = None
        if inputs is not None:
            self._begin_observation(context, inputs)
        if context.observation is None:
            return
        try:
            served.observer.end(context, outputs)
        except Exception:
            log.exception("request %s could not be observed", context.request_id)

    def refuse(self, context: PredictContext, error: Exception, result: Result | None = None) -> Response:
        """Return the response for an error; `result` is the one that carried the error, if any."""
        context.outputs = None  # they may have been encoded, and then failed to be compressed
        problem = as_problem(error)
        status = STATUSES[problem.code]
        if isinstance(error, MemoryError):
            log.warning("memory ran out on request %s: %s", context.request_id, error)
        elif problem is not error:
            log.error("request %s failed", context.request_id, exc_info=error)
        now = self.clock()
        total_s = now - context.began
        # A key that is refused is no failure of a model, and whoever has none must not make it look like one.
        refused = isinstance(problem, (Unauthorized, Forbidden))
        metrics = self.resolver.no_model if refused else self.resolver.metrics_of(context)
        # A server that refuses what its client's deadline does not allow has done what it was asked to do.
        missed = isinstance(problem, DeadlineExceeded) and (
            context.head.timeout_text is not None or context.options.timeout_ms is not None
        )
        metrics.failed(status, total_s, problem.code, by_server=status >= 500 and not missed)
        if context.tenant is not None:
            context.tenant.ended(status)
        body = context.api.problem(problem, status, context.request_id)
        queue_s, compute_s = (result.queue_s, result.compute_s) if result is not None else (0.0, 0.0)
        headers = [
            (b"content-type", context.api.problem_type),
            (b"x-request-id", context.request_id.encode("latin-1")),
            (b"server-timing", server_timing(queue_s, compute_s, total_s)),
            *problem_headers(problem),
        ]
        name = self.resolver.model_of(context)
        self._recorder.ended(context, status, problem.code, len(body), now, result, name)
        return Response(status, headers, [body], len(body))

    def deadline(self, context: PredictContext) -> float:
        """Return the earliest deadline that is known by now, infinity if there is none.

        Before `decode` the timeout in the body is not known, nor the version if the body has to name the
        model. Raises InvalidInput for an invalid timeout.
        """
        served = context.served
        if served is None:
            return math.inf
        by_body = context.options.timeout_ms
        if context.head.timeout_text is not None:
            by_head = context.head.timeout_ms()
            timeout_s = (by_head if by_body is None else min(by_head, by_body)) / 1000
        elif by_body is not None:
            timeout_s = by_body / 1000
        elif served.view.timeout_s is not None:
            timeout_s = served.view.timeout_s
        else:
            return math.inf
        return context.began + timeout_s

    def expire(self, context: PredictContext) -> None:
        """Drop the entry if it still waits: its deadline has passed. Its result says so."""
        entry = context.entry
        if entry is not None and (context.flight is None or not self._flights.expire(context, entry)):
            self._inbox.cancel(entry.key, entry.id, "deadline")

    def abandon(self, context: PredictContext) -> None:
        """Drop the entry if it still waits, and expect no result: the client is gone."""
        if not context.recorded:
            self._recorder.ended(context, CLIENT_GONE, "disconnected", 0, self.clock(), None)
        entry = context.entry
        if entry is not None:
            self._results.unsubscribe(entry.id)
            if (context.flight is None and not context.leads) or self._flights.abandon(context, entry):
                self._inbox.cancel(entry.key, entry.id, "disconnected")

    def broke_off(self, context: PredictContext) -> None:
        """Take note that a fault of the server leaves a request without a response, or without its end."""
        if not context.recorded:
            self._recorder.ended(context, 500, InternalError.code, 0, self.clock(), None)

    def release(self, context: PredictContext) -> None:
        """Give back what the request holds: its response is written, or its client gone. May be repeated."""
        entry = context.entry
        if entry is not None:
            # First, because a server that drains waits for it whatever raises below.
            context.entry = None
            self.in_flight.release()
        if context.outputs is not None:
            # Only here, after the response: code that few requests run is in no cache of the CPU, and takes
            # many times as long as code that all of them run.
            self._observe(context, context.outputs)
        if context.offloaded_bytes:
            context.abandoned = True  # the body takes memory until the thread that has it is done
        else:
            self.budget.release(context)
            context.free()
        if entry is not None:
            if context.flight is not None:
                self._flights.release(context)
            elif self._release_outputs is not None:
                self._release_outputs(entry.key, entry.id)

    def submit_pass(
        self,
        context: PredictContext,
        tensors: Tensors,
        deadline: float,
        then: Callable[[Result], None],
        gradients: tuple[str, ...] = (),
    ) -> Entry:
        """Put rows in the queue that are not the request's own, by its options, and return their entry.

        `gradients` are names of gradients that are computed in place of outputs, in a run of their own.
        `then` is called once with the result, on the event loop, unless `end_pass` is called before; call
        that once the outputs are read. Raises what `submit` raises.
        """
        now = self.clock()
        entry = self._entry(context, tensors, now, deadline)
        if gradients:
            entry.outputs = gradients
            entry.group = entry.id
        tenant = context.tenant
        if tenant is not None:
            tenant.take_rows(entry.rows, now)
        self._results.subscribe(entry.id, then)
        try:
            self._inbox.offer(entry)
        except BaseException:
            self._results.unsubscribe(entry.id)
            if tenant is not None:
                tenant.give_rows_back(entry.rows)
            raise
        return entry

    def end_pass(self, entry: Entry) -> None:
        """Drop an entry of `submit_pass` if it still runs, and free the memory of its outputs."""
        if self._results.unsubscribe(entry.id):
            self._inbox.cancel(entry.key, entry.id, "disconnected")
        if self._release_outputs is not None:
            self._release_outputs(entry.key, entry.id)

    def record(self, context: PredictContext, status: int, code: str, size: int) -> None:
        """Record the end of a request that ran passes; `size` is that of its answer in bytes."""
        if context.tenant is not None and status != CLIENT_GONE:
            context.tenant.ended(status)
        name = self.resolver.model_of(context)
        self._recorder.ended(context, status, code, size, self.clock(), None, name)

    def fetch_pictures(self, pictures: PictureUrls) -> None:
        """Take URLs of `pictures` in JSON bodies from now on."""
        self._pictures = pictures
        self.offloader.fetches_pictures = True

    def allowance(self, context: PredictContext) -> Allowance:
        """Return what the thread that decodes the body may allocate and fetch."""
        served = context.served
        signature = None if served is None else served.signature
        pictures = self._pictures
        if pictures is None:
            return BodyAllowance(self.budget, context, self.max_body_bytes, signature)
        return BodyAllowance(self.budget, context, self.max_body_bytes, signature, pictures, self.deadline)

    def _entry(self, context: PredictContext, tensors: Tensors, now: float, deadline: float) -> Entry:
        served, options = context.served, context.options
        assert served is not None  # `decode` found it
        rows = served.rows(tensors)
        entry_id = next(self._entry_ids)
        size = context.input_bytes if not context.texts else 0
        if not size:
            for tensor in tensors.values():
                size += _bytes_of(tensor)
        group, row_load = served.group(entry_id, tensors, rows)
        entry = Entry(
            entry_id,
            served.view.key,
            tensors,
            rows,
            group,
            # A row takes memory in the queue even if it has no elements.
            max(8 * rows, size),
            now,
            deadline,
            options.priority or DEFAULT_PRIORITY,
            options.outputs,
            row_load,
            context.request_id,
        )
        if context.tenant is not None:
            context.tenant.mark(entry)
        return entry


def _bytes_of(tensor: Array) -> int:
    """Return about how many bytes of memory a tensor takes: an array only refers to its strings."""
    return tensor.nbytes if tensor.dtype.kind != "O" else sum(64 + len(text) for text in tensor.flat)
