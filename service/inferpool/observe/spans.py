"""OpenTelemetry spans of predict requests, if an endpoint for them is configured.

A request leaves one record when it ends. A background thread makes the spans from the record, with the
times that were measured anyway. The SDK's own variables (`OTEL_*`) configure the endpoint, the sampling and
the service name. The extra `otel` must be installed.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from inferpool import __version__
from inferpool.errors import ConfigError
from inferpool.observe.background import BackgroundWorker
from inferpool.observe.request_record import RequestRecord
from inferpool.observe.traceparent import Trace
from inferpool.system.install_hints import install_command

if TYPE_CHECKING:
    from opentelemetry.context import Context

log = logging.getLogger(__name__)

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"


class Moments(NamedTuple):
    """The times of a request by the predictor's clock; `offered` is None if it was never queued."""

    began: float
    offered: float | None
    ended: float


class _Ended(NamedTuple):
    """A request that has ended, whose spans are to be sent."""

    record: RequestRecord
    trace: Trace
    moments: Moments


class Spans:
    """Decides which requests are traced, and sends their spans."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Start the SDK; raises ConfigError if it is not installed or the protocol is not supported."""
        for name in _PROTOCOLS:
            if environ.get(name, _PROTOCOL) != _PROTOCOL:
                raise ConfigError(
                    f"{name} is {environ[name]!r}: only {_PROTOCOL} is supported; change or unset it"
                )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"{' and '.join(name for name in _ENDPOINTS if name in environ)} ask for spans, but the"
                f" OpenTelemetry SDK is not installed ({error}); install it with: {install_command('otel')}"
            ) from error
        resource = Resource.create({"service.version": __version__, "process.pid": os.getpid()})
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "inferpool"}))
        self._ids = _make_ids()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("inferpool", __version__)
        self._worker = BackgroundWorker[_Ended]("spans", self._send)

    def sample(self, trace: Trace | None) -> Trace:
        """The trace of a request: the client's `trace`, or a new one if that is None.

        In the result, `sampled` tells whether this server sends spans of the request.
        """
        if trace is None:
            trace = Trace(secrets.token_hex(16), "", sampled=False)
        decision = self._provider.sampler.should_sample(
            _context(trace), int(trace.id, 16), "predict"
        ).decision
        return trace._replace(sampled=decision.is_sampled())

    def put(self, record: RequestRecord, trace: Trace, moments: Moments) -> None:
        """Send the spans of a request, whose trace must be sampled."""
        self._worker.put(_Ended(record, trace, moments))

    def close(self, timeout_s: float) -> None:
        """Send the waiting spans; those that take longer than `timeout_s` are lost, with a warning."""
        self._worker.close(timeout_s)
        # The SDK ignores time limits here: it retries an unreachable collector for ten seconds.
        flush = threading.Thread(target=self._provider.force_flush, daemon=True)
        flush.start()
        flush.join(timeout_s)
        if flush.is_alive():
            log.warning("some spans are lost: they could not be sent within %g s", timeout_s)
            self._exporter.shutdown()
        self._provider.shutdown()

    def _send(self, requests: Sequence[_Ended]) -> None:
        for request in requests:
            self._send_one(request)

    def _send_one(self, request: _Ended) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        record, trace, moments = request

        def at(moment: float) -> int:
            return int(1e9 * (record.time - (moments.ended - moment)))

        self._ids.trace_id = int(trace.id, 16)
        root = self._tracer.start_span(
            "predict",
            _context(trace),
            SpanKind.SERVER,
            _attributes(record),
            start_time=at(moments.began),
        )
        if record.status >= 500:
            root.set_status(StatusCode.ERROR)
        within = set_span_in_context(root, Context())
        for name, start, end in phases(record, moments):
            self._tracer.start_span(name, within, start_time=at(start)).end(at(end))
        root.end(at(moments.ended))


def make_spans(environ: Mapping[str, str] = os.environ) -> Spans | None:
    """Spans if a variable names an endpoint and none disables them, else None; raises ConfigError."""
    off = (
        environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        or environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none"
    )
    if off or not any(environ.get(name) for name in _ENDPOINTS):
        return None
    return Spans(environ)


def phases(record: RequestRecord, moments: Moments) -> list[tuple[str, float, float]]:
    """The phases of a request in order: name, begin and end of each, by the predictor's clock."""
    if moments.offered is None:
        return [("receive", moments.began, moments.ended)]
    found = [("receive", moments.began, moments.offered)]
    now = moments.offered
    for name, seconds in (("queue", record.queue_s), ("compute", record.compute_s)):
        if seconds is not None:
            # The parts of a split request may run at the same time: their sum may exceed the whole.
            end = min(now + seconds, moments.ended)
            found.append((name, now, end))
            now = end
    return [*found, ("respond", now, moments.ended)]


def _attributes(record: RequestRecord) -> dict[str, str | int]:
    """The attributes of the root span: OpenTelemetry's names for HTTP, `inferpool.*` for the rest."""
    named: dict[str, str | int | None] = {
        "http.request.method": "POST",
        "http.response.status_code": record.status,
        "http.request.body.size": record.bytes_in,
        "http.response.body.size": record.bytes_out,
        "error.type": None if record.code == "ok" else record.code,
        "inferpool.request_id": record.request_id,
        "inferpool.model": record.model,
        "inferpool.version": record.version,
        "inferpool.rows": record.rows,
        "inferpool.batch_rows": record.batch_rows,
    }
    return {name: value for name, value in named.items() if value is not None}


def _context(trace: Trace) -> Context:
    """The caller's span as a context of the SDK; an empty context if the trace begins here."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if not trace.parent:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    caller = SpanContext(int(trace.id, 16), int(trace.parent, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(caller), Context())


def _make_ids() -> Any:
    """An id generator for the SDK that gives a new trace the id of its log line."""
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):  # type: ignore[misc]  # of an optional package, which mypy skips
        trace_id = 0

        def generate_trace_id(self) -> int:
            return self.trace_id

    return Ids()
