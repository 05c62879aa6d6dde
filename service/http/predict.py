"""Predict: from a request's head and body to an entry in the inbox, and from its result to an answer.

One implementation for every lane. It is plain code, without tasks or waiting: a lane reads the body,
calls `begin`, waits for the call's future, calls `answer`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from service.errors import (
    BodyTooLarge,
    Draining,
    InternalError,
    InvalidInput,
    UnsupportedMediaType,
)
from service.http.bodies import JSON, NPY, NPZ, Body, Options, decompress
from service.http.head import Head
from service.http.outlet import Outlet
from service.http.problems import PROBLEM_TYPE, Headers, as_problem, problem_body, problem_headers
from service.metrics import Metrics, Value
from service.pool.ports import DEFAULT_PRIORITY, Entry, Inbox, Result, VersionKey
from service.repository.catalog import Catalog, VersionView, find_ready
from service.tensors import ANY, Tensors, check_outputs, names_text
from service.wire.json import encode_response
from service.wire.npy import encode_npy, encode_npz

log = logging.getLogger(__name__)
access = logging.getLogger("inferpool.access")

HEAVY_BYTES: Final = 32 * 1024
"""Bodies that must be decoded or decompressed, and have more bytes than this, go to another thread."""


@dataclass(slots=True)
class Answer:
    """What goes back; `headers` name the body's type, but not its length."""

    status: int
    headers: Headers
    body: bytes


class Call:
    """One predict request on its way: what its lane holds on to."""

    __slots__ = ("began", "entry", "future", "head", "options", "served", "timer")

    def __init__(self, head: Head, began: float) -> None:
        """`began` is the moment at which the head was there."""
        self.head = head
        self.began = began
        self.options = Options()
        self.served: _Served | None = None
        self.entry: Entry | None = None
        self.future: asyncio.Future[Result] | None = None
        self.timer: asyncio.TimerHandle | None = None


class _Served:
    """What is looked up once a version: its meters, and how its entries are told apart."""

    def __init__(self, view: VersionView, metrics: Metrics) -> None:
        self.view = view
        self.version = str(view.key.version)
        self.meters = _Meters(metrics, view.key.model, str(view.key.version))
        signature = view.signature
        specs = signature.inputs if signature is not None else ()
        outputs = signature.outputs if signature is not None else ()
        self.optional = frozenset(spec.name for spec in specs if spec.optional)
        self.bf16 = tuple(spec.name for spec in outputs if spec.datatype == "BF16")
        # Where every row of every request has the same shape there is but one group.
        self.one_group = all(
            spec.optional or (spec.shape is not None and ANY not in spec.shape[1:]) for spec in specs
        )

    def rows(self, tensors: Tensors) -> int:
        """Rows of a request; raises InvalidInput where its inputs do not agree on them."""
        if not self.view.batching.enabled:
            return 1
        counts = {name: len(tensor) for name, tensor in tensors.items() if name not in self.optional}
        rows = next(iter(counts.values()))
        if any(count != rows for count in counts.values()):
            found = ", ".join(f'"{name}" has {count}' for name, count in counts.items())
            raise InvalidInput(f"the first dimension counts rows, the same for every input: {found}")
        return rows

    def group(self, entry_id: int, tensors: Tensors, rows: int) -> Hashable:
        """What must be equal for entries to share a batch."""
        if not rows or not self.optional.isdisjoint(tensors):
            # Nothing to share, or an input that holds for the whole run: such an entry runs alone.
            if rows > self.view.batching.max_rows:
                raise InvalidInput(
                    f"a request that sets {names_text(sorted(self.optional & tensors.keys()))} may have"
                    f" {self.view.batching.max_rows} rows at the most, not {rows}"
                )
            return entry_id
        if self.one_group:
            return None
        return tuple((name, tensor.shape[1:]) for name, tensor in sorted(tensors.items()))


class _Meters:
    """The values that a version's requests are counted in."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics = metrics
        self._labels = (model, version)
        self._by_status: dict[int, Value] = {}
        self._total = metrics.distribution("request_duration_seconds", model, version)
        self._queue = metrics.distribution("queue_duration_seconds", model, version)
        self._compute = metrics.distribution("compute_duration_seconds", model, version)

    def count(self, status: int, total_s: float, result: Result | None) -> None:
        value = self._by_status.get(status)
        if value is None:
            value = self._metrics.value("requests_total", *self._labels, str(status))
            self._by_status[status] = value
        value.value += 1
        self._total.observe(total_s)
        if result is not None:
            self._queue.observe(result.queue_s)
            self._compute.observe(result.compute_s)


class Predictor:
    """Turns requests into entries and results into answers.

    All of it runs on the event loop, except `read`, which may run in any thread.
    """

    def __init__(
        self,
        catalog: Catalog,
        inbox: Inbox,
        outlet: Outlet,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        max_body_bytes: int,
        access_log: bool,
    ) -> None:
        self.clock = clock
        self.max_body_bytes = max_body_bytes
        self.in_flight = 0
        self.draining = False
        self._idle: asyncio.Event | None = None
        self._catalog = catalog
        self._inbox = inbox
        self._outlet = outlet
        self._metrics = metrics
        self._access_log = access_log
        self._ids = itertools.count(1)
        self._served: dict[VersionKey, _Served] = {}
        self._nobody = _Meters(metrics, "", "")
        metrics.add_source(lambda: [("in_flight_requests", (), float(self.in_flight))])

    def enter(self) -> None:
        """A request's head is there."""
        self.in_flight += 1

    def leave(self) -> None:
        """A request has its answer, or its client has gone."""
        self.in_flight -= 1
        if not self.in_flight and self._idle is not None:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is in flight; nothing that comes after this call counts as accepted."""
        self._idle = asyncio.Event()
        if self.in_flight:
            await self._idle.wait()

    def admit(self, call: Call) -> None:
        """Refuse, before its body is read, a request that would be refused whatever is in it.

        Raises ModelNotFound, VersionNotFound, BodyTooLarge, QueueFull, NotReady or Draining.
        """
        if self.draining:
            raise Draining("the server is shutting down")
        head = call.head
        if (head.content_length or 0) > self.max_body_bytes:
            raise self.too_large()
        if head.model is not None:
            call.served = self._find(head.model, head.version)
            self._inbox.refuse_early(call.served.view.key)

    def too_large(self) -> BodyTooLarge:
        """The error for a body of more than `max_body_bytes`."""
        return BodyTooLarge(f"the body is larger than {self.max_body_bytes} bytes", limit=self.max_body_bytes)

    def is_heavy(self, head: Head, size: int) -> bool:
        """Whether reading a body of `size` bytes would keep the event loop from its other work."""
        return size > HEAVY_BYTES and (bool(head.content_encoding) or head.content_type.startswith("image/"))

    def read(self, call: Call, data: bytes) -> Tensors:
        """The inputs of a request, validated; settles which version it means.

        Raises every RequestError there is, and NotReady.
        """
        head = call.head
        plain = decompress(data, head.content_encoding, self.max_body_bytes)
        body = Body(head.content_type, plain, self.max_body_bytes)
        options = call.options = body.options
        if head.model is None or (head.version is None and options.version is not None):
            call.served = self._find(head.model or self._model_named(options.model), options.version)
        elif options.model not in (None, head.model) or options.version not in (None, head.version):
            raise InvalidInput("the body names another model or version than the path does", field="model")
        served = call.served
        assert served is not None  # found by `admit` where the path names it
        tensors = body.tensors(served.view)
        if options.outputs is not None and served.view.signature is not None:
            check_outputs(served.view.signature, options.outputs)
        return tensors

    def offer(self, call: Call, tensors: Tensors) -> asyncio.Future[Result]:
        """Put the request in the queue; the future is its result's.

        Raises InvalidInput, QueueFull, DeadlineExceeded, NotReady or Draining. After this, `end` must be
        called whatever happens.
        """
        served = call.served
        assert served is not None  # `read` found it
        view, options = served.view, call.options
        rows = served.rows(tensors)
        entry_id = next(self._ids)
        timeout_s = self._timeout_s(call)
        entry = Entry(
            entry_id,
            view.key,
            tensors,
            rows,
            served.group(entry_id, tensors, rows),
            sum(tensor.nbytes for tensor in tensors.values()),
            self.clock(),
            call.began + timeout_s,
            options.priority or DEFAULT_PRIORITY,
            options.outputs,
        )
        future = self._outlet.expect(entry_id)
        try:
            self._inbox.offer(entry)
        except BaseException:
            self._outlet.forget(entry_id)
            raise
        call.entry, call.future = entry, future
        if timeout_s < math.inf:
            call.timer = asyncio.get_running_loop().call_later(
                max(0.0, entry.deadline - entry.arrived), self._cancel, entry, "deadline"
            )
        return future

    def drop(self, call: Call) -> None:
        """The client has gone: do not run its entry if it still waits."""
        if call.entry is not None:
            self._outlet.forget(call.entry.id)
            self._cancel(call.entry, "disconnected")

    def end(self, call: Call) -> None:
        """The lane is done with the call."""
        if call.timer is not None:
            call.timer.cancel()

    def answer(self, call: Call, result: Result) -> Answer:
        """The answer for a result, good or bad."""
        served = call.served
        if result.error is not None or result.outputs is None or served is None:
            return self.refusal(call, result.error or InternalError("no result"), result)
        head = call.head
        try:
            media_type, body = self._encode(call, served, result.outputs)
        except Exception as error:  # noqa: BLE001 - what cannot be encoded is this request's fault alone
            return self.refusal(call, error, result)
        total_s = self.clock() - call.began
        served.meters.count(200, total_s, result)
        headers = [
            (b"content-type", media_type),
            (b"x-request-id", head.request_id.encode("latin-1")),
            (b"server-timing", server_timing(result.queue_s, result.compute_s, total_s)),
        ]
        if self._access_log:
            self._log(call, 200, total_s, result)
        return Answer(200, headers, body)

    def refusal(self, call: Call, error: Exception, result: Result | None = None) -> Answer:
        """The answer for an error."""
        problem = as_problem(error)
        head = call.head
        status, body = problem_body(problem, head.request_id)
        if problem is not error:
            log.error("request %s failed", head.request_id, exc_info=error)
        total_s = self.clock() - call.began
        meters = call.served.meters if call.served is not None else self._nobody
        meters.count(status, total_s, None)
        queue_s, compute_s = (result.queue_s, result.compute_s) if result is not None else (0.0, 0.0)
        headers = [
            (b"content-type", PROBLEM_TYPE),
            (b"x-request-id", head.request_id.encode("latin-1")),
            (b"server-timing", server_timing(queue_s, compute_s, total_s)),
            *problem_headers(problem),
        ]
        if self.draining:
            headers.append((b"connection", b"close"))
        if self._access_log:
            self._log(call, status, total_s, result)
        return Answer(status, headers, body)

    def _cancel(self, entry: Entry, reason: str) -> None:
        self._inbox.cancel(entry.key, entry.id, reason)

    def _timeout_s(self, call: Call) -> float:
        """Seconds that the request may take: the shortest of what was said; infinity if nothing was."""
        said = [ms for ms in (call.head.timeout_ms(), call.options.timeout_ms) if ms is not None]
        if said:
            return min(said) / 1000
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

    def _find(self, model: str, version: str | None) -> _Served:
        view = find_ready(self._catalog, model, version)
        served = self._served.get(view.key)
        if served is None or served.view is not view:
            served = self._served[view.key] = _Served(view, self._metrics)
        return served

    def _encode(self, call: Call, served: _Served, outputs: Tensors) -> tuple[bytes, bytes]:
        """The media type that the caller accepts, and the body in it."""
        accept = call.head.accept
        if NPY in accept or NPZ in accept:
            if NPY in accept and len(outputs) == 1:
                return NPY.encode(), encode_npy(next(iter(outputs.values())))
            if NPZ in accept:
                return NPZ.encode(), encode_npz(outputs)
            raise UnsupportedMediaType(
                f"the answer has {len(outputs)} outputs: ask for one by name, or accept {NPZ}"
            )
        view = served.view
        classes = view.classes
        predictions = None
        if classes is not None and classes.output in outputs:
            predictions = classes.predictions(outputs)
        body = encode_response(
            view.key.model,
            served.version,
            call.options.id or call.head.request_id,
            outputs,
            predictions,
            served.bf16,
        )
        return JSON.encode(), body

    def _log(self, call: Call, status: int, total_s: float, result: Result | None) -> None:
        key = call.served.view.key if call.served is not None else None
        access.info(
            "predict",
            extra={
                "request_id": call.head.request_id,
                "status": status,
                "model": key.model if key is not None else None,
                "version": key.version if key is not None else None,
                "rows": call.entry.rows if call.entry is not None else None,
                "batch_rows": result.batch_rows if result is not None else None,
                "queue_ms": round(1000 * result.queue_s, 3) if result is not None else None,
                "compute_ms": round(1000 * result.compute_s, 3) if result is not None else None,
                "total_ms": round(1000 * total_s, 3),
            },
        )


def server_timing(queue_s: float, compute_s: float, total_s: float) -> bytes:
    """The Server-Timing header (W3C Server Timing), in milliseconds."""
    return b"queue;dur=%.3f, compute;dur=%.3f, total;dur=%.3f" % (
        1000 * queue_s,
        1000 * compute_s,
        1000 * total_s,
    )
