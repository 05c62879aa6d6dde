"""OpenTelemetry spans of predict requests, where the extra `otel` is installed and told where to send them.

A request leaves one note behind when it ends. The spans are made of it by a thread beside the event
loop, after the fact, with the times that were measured anyway. The SDK's own variables (`OTEL_*`) configure
everything: where to, how much, under which name.
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
from inferpool.observe.request_record import Record
from inferpool.observe.traceparent import Trace
from inferpool.system.install_hints import install_command

if TYPE_CHECKING:
    from opentelemetry.context import Context

log = logging.getLogger(__name__)

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"


class Moments(NamedTuple):
    """When things happened to a request, by the predictor's clock; `offered` is None if it never was."""

    began: float
    offered: float | None
    ended: float


class Note(NamedTuple):
    """What a request leaves behind for its spans."""

    record: Record
    trace: Trace
    moments: Moments


class Spans:
    """Decides which requests are traced, and sends their spans."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raises ConfigError where the SDK is missing, or is told to speak what is not there."""
        for name in _PROTOCOLS:
            if environ.get(name, _PROTOCOL) != _PROTOCOL:
                raise ConfigError(f"{name} is {environ[name]!r}: spans are sent as {_PROTOCOL}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"spans are asked for ({', '.join(name for name in _ENDPOINTS if name in environ)}), which"
                f" takes: {install_command('otel')} ({error})"
            ) from error
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "inferpool"}))
        self._ids = _make_ids()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("inferpool", __version__)
        self._aside = BackgroundWorker[Note]("spans", self._send)

    def sample(self, trace: Trace | None) -> Trace:
        """The trace of a request that came with `trace`: a new one where it came with none.

        `sampled` says whether its spans are wanted here.
        """
        if trace is None:
            trace = Trace(secrets.token_hex(16), "", sampled=False)
        decision = self._provider.sampler.should_sample(
            _context(trace), int(trace.id, 16), "predict"
        ).decision
        return trace._replace(sampled=decision.is_sampled())

    def put(self, record: Record, trace: Trace, moments: Moments) -> None:
        """Send the spans of a request whose trace is sampled."""
        self._aside.put(Note(record, trace, moments))

    def close(self, timeout_s: float) -> None:
        """Send what waits, as far as that takes no longer."""
        self._aside.close(timeout_s)
        # The SDK keeps to no limit here: a collector that is gone is tried again for ten seconds.
        flush = threading.Thread(target=self._provider.force_flush, daemon=True)
        flush.start()
        flush.join(timeout_s)
        if flush.is_alive():
            log.warning("spans were left behind: they could not be sent within %g s", timeout_s)
            self._exporter.shutdown()
        self._provider.shutdown()

    def _send(self, notes: Sequence[Note]) -> None:
        for note in notes:
            self._send_one(note)

    def _send_one(self, note: Note) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        record, trace, moments = note

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
    """Spans, where a variable says where to send them and none switches them off; raises ConfigError."""
    off = (
        environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        or environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none"
    )
    if off or not any(environ.get(name) for name in _ENDPOINTS):
        return None
    return Spans(environ)


def phases(record: Record, moments: Moments) -> list[tuple[str, float, float]]:
    """What a request went through: name, begin and end of each phase, one after the other."""
    if moments.offered is None:
        return [("receive", moments.began, moments.ended)]
    found = [("receive", moments.began, moments.offered)]
    now = moments.offered
    for name, seconds in (("queue", record.queue_s), ("compute", record.compute_s)):
        if seconds is not None:
            # The pieces of a large request may have run side by side: together longer than it took.
            end = min(now + seconds, moments.ended)
            found.append((name, now, end))
            now = end
    return [*found, ("respond", now, moments.ended)]


def _attributes(record: Record) -> dict[str, str | int]:
    """OpenTelemetry's names for what is HTTP's, our own for what is ours."""
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
    """The caller's span as the SDK wants it; an empty context where the trace begins here."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if not trace.parent:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    caller = SpanContext(int(trace.id, 16), int(trace.parent, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(caller), Context())


def _make_ids() -> Any:
    """Ids for the SDK: a trace that begins here has the id that its log line has."""
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Ids(RandomIdGenerator):  # type: ignore[misc]  # of an optional package, which mypy skips
        trace_id = 0

        def generate_trace_id(self) -> int:
            return self.trace_id

    return Ids()
