"""Predict: from a request's head and body to an entry in the inbox, and from its result to an answer.

One implementation for every lane and every dialect. It is plain code, without tasks or waiting: a lane
calls `admit`, puts the body together, calls `read` and `offer`, and with the result `answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Final

from inferpool.errors import (
    DeadlineExceeded,
    Draining,
    InferpoolError,
    InternalError,
    InvalidInput,
    Overloaded,
)
from inferpool.http.connection.deferred_calls import DeferredCalls
from inferpool.http.connection.head_cache import HeadCache
from inferpool.http.connection.response_head import ResponsePrefix, server_timing
from inferpool.http.predict.api import Data
from inferpool.http.predict.body_buffer import too_large
from inferpool.http.predict.compression import decompress, takes_gzip
from inferpool.http.predict.context import PredictContext, Response
from inferpool.http.predict.offload import DecodeOffloader
from inferpool.http.predict.recorder import CLIENT_GONE, RequestRecorder
from inferpool.http.predict.results import ResultDispatcher
from inferpool.http.predict.served_version import RequestMetrics, RequestStats, ServedVersion
from inferpool.http.problems import STATUSES, as_problem, problem_headers
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import DEFAULT_PRIORITY, Entry, Inbox, Part, Result, VersionKey
from inferpool.pool.splitting import split_entry
from inferpool.repository.catalog import Catalog, ModelView, find_ready
from inferpool.tensors import Array, Tensors, check_outputs, names_text

log = logging.getLogger(__name__)

MOST_FOUND: Final = 256
"""Ways of naming a version that are remembered: by its number, its labels, or not at all."""
_MIN_GZIP_BYTES: Final = 1024
"""Smaller answers fit a packet or two as they are."""


class Predictor:
    """Turns requests into entries and results into answers.

    All of it runs on the event loop, except `read`, which may run in any thread.
    """

    def __init__(
        self,
        catalog: Catalog,
        inbox: Inbox,
        outlet: ResultDispatcher,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        max_body_bytes: int,
        in_flight_bytes: int,
        recorder: RequestRecorder,
    ) -> None:
        self.clock = clock
        self.max_body_bytes = max_body_bytes
        self._in_flight_bytes = in_flight_bytes
        self._reserved_bytes = 0
        self.in_flight = 0
        self.parting = False
        self.draining = False
        self.accepted = 0
        # Made when somebody waits for it: to set it takes as long as many a step of a request.
        self._left: asyncio.Event | None = None
        self._catalog = catalog
        self._inbox = inbox
        self._outlet = outlet
        self.volley = outlet.volley
        self._metrics = metrics
        self._recorder = recorder
        self._ids = itertools.count(1)
        self._served: dict[VersionKey, ServedVersion] = {}
        self._tallies: dict[VersionKey, RequestStats] = {}
        # What requests have meant by their paths, as long as the catalog's models are the same.
        self._found = _Found({})
        self._heavy = DecodeOffloader(catalog)
        self.heads = HeadCache()
        self.turn = DeferredCalls()
        self.preamble = ResponsePrefix()
        self._nobody = RequestMetrics(metrics, "", "", RequestStats())
        self._unserved: dict[str, RequestMetrics] = {}
        metrics.add_source(lambda: [("in_flight_requests", (), float(self.in_flight))])

    def enter(self) -> None:
        """A request's head is there."""
        self.in_flight += 1

    def leave(self, call: PredictContext) -> None:
        """A request has its answer, or its client has gone."""
        self.in_flight -= 1
        self.answered(call)
        if self._left is not None:
            self._left.set()

    def reserve(self, call: PredictContext, size: int) -> None:
        """Make room for `size` bytes of body; raises Overloaded where those in flight leave none.

        A body is always let in where no other is in flight: the bound must not make it impossible.
        """
        others = self._reserved_bytes - call.reserved_bytes
        if others and self._reserved_bytes + size > self._in_flight_bytes:
            raise Overloaded(f"{others} bytes of other requests are in flight already")
        self._reserved_bytes += size
        call.reserved_bytes += size

    def keep(self, call: PredictContext, size: int) -> None:
        """Count `size` bytes of an answer that its client does not read against those in flight."""
        self._reserved_bytes += size
        call.reserved_bytes += size

    def answered(self, call: PredictContext) -> None:
        """The request's body is of no more use, and its answer is on its way, read or not."""
        if call.aside_bytes:
            call.given_up = True  # a thread has the body, or will have: it takes memory until then
        else:
            self._reserved_bytes -= call.reserved_bytes
            call.reserved_bytes = 0
        if call.entry is not None:
            call.entry = None
            self.accepted -= 1
            if self._left is not None:
                self._left.set()

    async def idle(self, grace_s: float) -> None:
        """Wait until every accepted request has its answer.

        Those whose bodies are still coming in get `grace_s` seconds to become accepted ones.
        """
        ends = self.clock() + grace_s
        self._left = asyncio.Event()
        while self.in_flight and (self.accepted or self.clock() < ends):
            self._left.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), None if self.accepted else ends - self.clock())

    def admit(self, call: PredictContext) -> None:
        """Refuse, before its body is read, a request that would be refused whatever is in it.

        Raises ModelNotFound, VersionNotFound, BodyTooLarge, QueueFull, NotReady, Overloaded or Draining.
        """
        if self.draining:
            raise Draining("the server is shutting down")
        head = call.head
        if (head.content_length or 0) > self.max_body_bytes:
            raise too_large(self.max_body_bytes)
        if head.model is not None:
            call.served = self._find(head.model, head.version)
            self._inbox.refuse_early(call.served.view.key)
        if self._reserved_bytes and self._reserved_bytes + (head.content_length or 0) > self._in_flight_bytes:
            raise Overloaded(f"{self._reserved_bytes} bytes of other requests are in flight already")

    def is_heavy(self, call: PredictContext, data: Data) -> bool:
        """Whether reading a body would keep the event loop from its other work."""
        return self._heavy.is_heavy(call, data)

    def set_aside(self, call: PredictContext, size: int, expire: Callable[[], None]) -> Executor | None:
        """Prepare for a heavy body of `size` bytes to be read in another thread, and call `taken_back` then.

        Returns whose thread, None for whichever there is. `expire` is called if the deadline passes first.
        Raises Overloaded where too much text waits already, and DeadlineExceeded.
        """
        self._heavy.check_room(call, size)
        timeout_s = math.inf if call.served is None else self._timeout_s(call)
        if timeout_s < math.inf:
            left_s = call.began + timeout_s - self.clock()
            if left_s <= 0:
                raise DeadlineExceeded("the deadline passed before the body was there")
            call.timer = asyncio.get_running_loop().call_later(left_s, expire)
        return self._heavy.begin(call, size)

    def taken_back(self, call: PredictContext) -> bool:
        """A body has been read in another thread; whether its request is still to be answered."""
        self._heavy.end(call)
        if call.given_up:
            self.answered(call)
        self.end(call)
        return not call.given_up

    def tally(self, key: VersionKey) -> RequestStats:
        """How the requests of a version ended; it is read, not written."""
        return self._tallies.get(key) or RequestStats()

    def read(self, call: PredictContext, data: Data) -> Tensors:
        """The inputs of a request, validated; settles which version it means.

        Raises every RequestError there is, and NotReady.
        """
        if call.given_up:
            raise InferpoolError("nobody waits for the answer")
        began = self.clock()
        head = call.head
        plain = (
            decompress(data, head.content_encoding, self.max_body_bytes) if head.content_encoding else data
        )
        body = call.api.open(head, plain, self.max_body_bytes)
        options = call.options = body.options
        if head.model is None or (head.version is None and options.version is not None):
            call.served = self._find(head.model or self._model_named(options.model), options.version)
        elif options.model not in (None, head.model) or options.version not in (None, head.version):
            raise InvalidInput("the body names another model or version than the path does", field="model")
        served = call.served
        assert served is not None  # found by `admit` where the path names it
        tensors = body.tensors(served)
        if options.outputs is not None:
            check_outputs(served.signature, options.outputs)
        text = served.view.text
        if text is not None:
            if text.input in tensors:
                rows = len(tensors[text.input])
                call.texts = text.encode(tensors[text.input], apart=not served.view.batching.enabled)
                tensors = call.texts[0].tensors
                tokens = max(part.tensors[text.ids].shape[1] for part in call.texts)
            else:
                text.check(tensors)
                rows, tokens = tensors[text.ids].shape
            served.bound_answer(rows, tokens, options.outputs, self._in_flight_bytes)
        call.decode_s = self.clock() - began
        return tensors

    def offer(self, call: PredictContext, tensors: Tensors, then: Callable[[Result], None]) -> None:
        """Put the request in the queue; `then` is called with its result, unless it is dropped before.

        Raises InvalidInput, QueueFull, DeadlineExceeded, NotReady or Draining. After this, `end` must be
        called whatever happens.
        """
        served = call.served
        assert served is not None  # `read` found it
        timeout_s = self._timeout_s(call)
        now, deadline = self.clock(), call.began + timeout_s
        entry = self._entry(call, tensors, now, deadline)
        if len(call.texts) > 1:
            parts = [Part(self._entry(call, rows.tensors, now, deadline), rows.indices) for rows in call.texts]
            entry = split_entry(next(self._ids), parts)
        self._outlet.expect(entry.id, then)
        try:
            self._inbox.offer(entry)
        except BaseException:
            self._outlet.forget(entry.id)
            raise
        call.entry = entry
        self.accepted += 1
        if timeout_s < math.inf:
            call.timer = asyncio.get_running_loop().call_later(
                max(0.0, entry.deadline - entry.arrived), self._cancel, entry, "deadline"
            )

    def _entry(self, call: PredictContext, tensors: Tensors, now: float, deadline: float) -> Entry:
        served, options = call.served, call.options
        assert served is not None  # `read` found it
        rows = served.rows(tensors)
        entry_id = next(self._ids)
        group, row_load = served.group(entry_id, tensors, rows)
        return Entry(
            entry_id,
            served.view.key,
            tensors,
            rows,
            group,
            # A row takes memory here even where it has no elements.
            max(8 * rows, sum(map(_bytes_of, tensors.values()))),
            now,
            deadline,
            options.priority or DEFAULT_PRIORITY,
            options.outputs,
            row_load,
            call.request_id,
        )

    def drop(self, call: PredictContext) -> None:
        """The client has gone: do not run its entry if it still waits."""
        if not call.recorded:
            self._recorder.ended(call, CLIENT_GONE, "disconnected", 0, self.clock(), None)
        if call.entry is not None:
            self._outlet.forget(call.entry.id)
            self._cancel(call.entry, "disconnected")

    def end(self, call: PredictContext) -> None:
        """The lane is done with the call."""
        if call.timer is not None:
            call.timer.cancel()

    def answer(self, call: PredictContext, result: Result) -> Response:
        """The answer for a result, good or bad."""
        served, entry = call.served, call.entry
        if result.error is not None or result.outputs is None or served is None or entry is None:
            return self.refusal(call, result.error or InternalError("no result"), result)
        head = call.head
        began = self.clock()
        try:
            encoded = call.api.encode(head, call.options, call.request_id, served, result.outputs)
        except Exception as error:  # noqa: BLE001 - what cannot be encoded is this request's fault alone
            return self.refusal(call, error, result)
        now = self.clock()
        total_s = now - call.began
        served.meters.succeeded(entry.rows, call.decode_s, now - began, total_s, now, result)
        headers = [
            *encoded.headers,
            (b"x-request-id", call.request_id.encode("latin-1")),
            (b"server-timing", server_timing(result.queue_s, result.compute_s, total_s)),
        ]
        size = sum(map(len, encoded.parts))
        if self._recorder.follows_all or head.trace is not None:
            self._recorder.ended(call, 200, "ok", size, now, result)
        return Response(
            200, headers, encoded.parts, size, size >= _MIN_GZIP_BYTES and takes_gzip(head.accept_encoding)
        )

    def refusal(self, call: PredictContext, error: Exception, result: Result | None = None) -> Response:
        """The answer for an error."""
        problem = as_problem(error)
        status = STATUSES[problem.code]
        body = call.api.problem(problem, status, call.request_id)
        if problem is not error:
            log.error("request %s failed", call.request_id, exc_info=error)
        now = self.clock()
        total_s = now - call.began
        self._meters(call).failed(status, total_s)
        queue_s, compute_s = (result.queue_s, result.compute_s) if result is not None else (0.0, 0.0)
        headers = [
            (b"content-type", call.api.problem_type),
            (b"x-request-id", call.request_id.encode("latin-1")),
            (b"server-timing", server_timing(queue_s, compute_s, total_s)),
            *problem_headers(problem),
        ]
        self._recorder.ended(call, status, problem.code, len(body), now, result)
        return Response(status, headers, [body], len(body))

    def _meters(self, call: PredictContext) -> RequestMetrics:
        """Where a refused request counts: its version, or its model without one, or nowhere in particular."""
        if call.served is not None:
            return call.served.meters
        models = self._catalog.models()
        name = call.head.model or call.options.model
        if name is None and len(models) == 1:
            name = next(iter(models))
        # A client chooses any name, and labels must stay few.
        if name is None or name not in models:
            return self._nobody
        meters = self._unserved.get(name)
        if meters is None:
            meters = self._unserved[name] = RequestMetrics(self._metrics, name, "", RequestStats())
        return meters

    def _cancel(self, entry: Entry, reason: str) -> None:
        self._inbox.cancel(entry.key, entry.id, reason)

    def _timeout_s(self, call: PredictContext) -> float:
        """Seconds that the request may take: the shortest of what was said; infinity if nothing was."""
        by_head, by_body = call.head.timeout_ms(), call.options.timeout_ms
        if by_head is not None:
            return (by_head if by_body is None else min(by_head, by_body)) / 1000
        if by_body is not None:
            return by_body / 1000
        assert call.served is not None  # found before the queue
        default_s = call.served.view.timeout_s
        return math.inf if default_s is None else default_s

    def _model_named(self, name: str | None) -> str:
        """The model that a body means: the one it names, or the only one that is served."""
        if name is not None:
            return name
        models = self._catalog.models()
        if len(models) != 1:
            raise InvalidInput(
                f'the body must name a "model": {names_text(models)} are served', field="model"
            )
        return next(iter(models))

    def _find(self, model: str, version: str | None) -> ServedVersion:
        models = self._catalog.models()
        # Held on to: threads that read bodies come here too, and what one finds must not be put
        # among what another has found in later models.
        found = self._found
        if models is not found.models or len(found.served) >= MOST_FOUND:
            found = self._found = _Found(models)
        named = (model, version)
        served = found.served.get(named)
        if served is None:
            served = found.served[named] = self._look_up(model, version)
        return served

    def _look_up(self, model: str, version: str | None) -> ServedVersion:
        view = find_ready(self._catalog, model, version)
        served = self._served.get(view.key)
        if served is None or served.view is not view:
            tally = self._tallies.setdefault(view.key, RequestStats())
            served = self._served[view.key] = ServedVersion(view, self._metrics, tally)
        return served


class _Found:
    """What requests have meant by their paths while the catalog's models were `models`."""

    __slots__ = ("models", "served")

    def __init__(self, models: Mapping[str, ModelView]) -> None:
        self.models = models
        self.served: dict[tuple[str, str | None], ServedVersion] = {}


def _bytes_of(tensor: Array) -> int:
    """What a tensor takes in memory, about: text is not in the array that refers to it."""
    return tensor.nbytes if tensor.dtype.kind != "O" else sum(64 + len(text) for text in tensor.flat)
