"""Spans as a small collector receives them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from inferpool.observe.spans import make_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.chaos.inferpool_chaos import RAISE
from tests.clients import Client, with_clients
from tests.conftest import MakeChaos, Serve
from tests.server import ROOT, wait_until

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTHER_TRACE = "1af7651916cd43dd8448eb211c80319c"
SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
ROWS = {"inputs": [[1, 2, 3, 4], [5, 6, 7, 8]]}
PHASES = ["receive", "queue", "compute", "respond"]


class Collector:
    """An OTLP endpoint over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def spans(self) -> list[Span]:
        """Every span that was received."""
        return [
            span
            for request in self.requests
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    def processes(self) -> set[int]:
        """The ids of the processes that sent spans."""
        return {
            each.value.int_value
            for request in self.requests
            for of_resource in request.resource_spans
            for each in of_resource.resource.attributes
            if each.key == "process.pid"
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def attributes(span: Span) -> dict[str, Any]:
    """A span's attributes as plain values."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


class Sent(NamedTuple):
    """What a server that has ended has sent and logged; `traces` are the spans of its requests by model."""

    requests: list[ExportTraceServiceRequest]
    traces: dict[str, list[list[Span]]]
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
def sent(module_serve: Serve, module_make_chaos: MakeChaos) -> Iterator[Sent]:
    """Requests with and without a trace, that succeed and that fail, each kind to a model of its own."""
    for name in ("traced", "untraced"):
        module_make_chaos(name, run_ms=20)
    repository = module_make_chaos("failing")
    collector = Collector()
    try:
        server = module_serve(repository, "--access-log", OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
        headers = {**SAMPLED, "X-Request-Id": "mine"}
        assert server.post("/predict/traced", json=ROWS, headers=headers).status_code == 200
        for _ in range(3):
            server.post("/predict/untraced", json=ROWS)
        server.post("/predict/untraced", json=ROWS, headers={"traceparent": f"00-{OTHER_TRACE}-{CALLER}-00"})
        server.post("/predict/failing", json={"inputs": [[RAISE] * 4]})
        server.post("/predict/failing", json={"inputs": [[1]]})
        assert server.stop() == 0
        spans = collector.spans()
        traces: dict[str, list[list[Span]]] = {}
        for root in (span for span in spans if span.name == "predict"):
            children = [span for span in spans if span.parent_span_id == root.span_id]
            children.sort(key=lambda span: PHASES.index(span.name))
            traces.setdefault(attributes(root)["inferpool.model"], []).append([root, *children])
        assert sum(len(trace) for found in traces.values() for trace in found) == len(spans)
        yield Sent(collector.requests, traces, server.log)
    finally:
        collector.close()


def test_a_request_becomes_a_span_with_a_child_for_each_phase(sent: Sent) -> None:
    """The span is a child of the client's span; its phases follow one another and fill it."""
    [[root, *children]] = sent.traces["traced"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, CALLER)
    assert root.kind == Span.SPAN_KIND_SERVER
    assert root.status.code == Status.STATUS_CODE_UNSET
    found = attributes(root)
    assert found.pop("http.request.body.size") > 0
    assert found.pop("http.response.body.size") > 0
    # On a busy machine the measured batch size may be 1.
    assert found.pop("inferpool.batch_rows") in (1, 2)
    assert found == {
        "http.request.method": "POST", "http.response.status_code": 200, "inferpool.request_id": "mine",
        "inferpool.model": "traced", "inferpool.version": 1, "inferpool.rows": 2,
    }  # fmt: skip
    assert [span.name for span in children] == PHASES
    for span in children:
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
    edges = [root.start_time_unix_nano, *(span.end_time_unix_nano for span in children)]
    for begin, span in zip(edges, children, strict=False):
        # Moments are turned into nanoseconds one by one.
        assert abs(span.start_time_unix_nano - begin) <= 1000
        assert span.start_time_unix_nano <= span.end_time_unix_nano + 1000
    assert edges[-1] == root.end_time_unix_nano
    compute = children[2]
    assert compute.end_time_unix_nano - compute.start_time_unix_nano >= 20e6
    resources = [each.resource for request in sent.requests for each in request.resource_spans]
    for resource in resources:
        values = {each.key: each.value.string_value for each in resource.attributes}
        assert values["service.name"] == "inferpool"


def test_a_request_without_a_trace_begins_one(sent: Sent) -> None:
    """Each request begins a trace, whose id its log line has; a request that is not sampled has no spans."""
    traces = sent.traces["untraced"]
    logged = {line["trace_id"] for line in sent.log if line.get("model") == "untraced" and "trace_id" in line}
    assert {root.trace_id.hex() for root, *_ in traces} | {OTHER_TRACE} == logged
    assert not any(root.parent_span_id for root, *_ in traces)
    assert len(logged) == 4
    assert [len(trace) for trace in traces] == [5] * 3


def test_spans_of_failed_requests_are_errors(sent: Sent) -> None:
    """The span of a 5xx is an error with its code; that of a 4xx is not, and has one phase only."""
    traces = {attributes(trace[0])["http.response.status_code"]: trace for trace in sent.traces["failing"]}
    assert traces[500][0].status.code == Status.STATUS_CODE_ERROR
    assert attributes(traces[500][0])["error.type"] == "model_failed"
    assert traces[422][0].status.code == Status.STATUS_CODE_UNSET
    assert attributes(traces[422][0])["error.type"] == "invalid_input"
    assert [span.name for span in traces[422][1:]] == ["receive"]


def test_a_sampler_that_is_always_off_sends_no_spans(
    serve: Serve, make_chaos: MakeChaos, collector: Collector
) -> None:
    """OpenTelemetry's own variables decide which spans are sent."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_TRACES_SAMPLER": "always_off"}
    server = serve(make_chaos("m"), **environ)
    assert server.post("/predict/m", json=ROWS, headers=SAMPLED).status_code == 200
    assert server.stop() == 0
    assert collector.spans() == []


@pytest.mark.parametrize("environ", [{"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}])
def test_opentelemetrys_own_variables_switch_spans_off(environ: dict[str, str]) -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert make_spans({**endpoint, **environ}) is None


def test_an_unreachable_collector_costs_no_request(serve: Serve, make_chaos: MakeChaos) -> None:
    """Requests are answered, and the server ends without waiting for the collector."""
    nobody = "http://127.0.0.1:9"
    server = serve(make_chaos("m"), OTEL_EXPORTER_OTLP_ENDPOINT=nobody, OTEL_BSP_SCHEDULE_DELAY="50")
    for _ in range(20):
        assert server.post("/predict/m", json=ROWS).status_code == 200
    assert server.stop(timeout_s=30) == 0
    server.wait_for("some spans are lost")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
        ({}, "pip install 'inferpool[otel]'"),
    ],
    ids=["protocol", "extra"],
)
def test_spans_that_cannot_be_sent_are_an_error_at_the_start(
    environ: dict[str, str], message: str, tmp_path: Path
) -> None:
    """A server that is told to send spans does not start if it cannot send them."""
    if not environ:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.sdk'] = None\n")
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "serve", "models", "--port", "0"],
        cwd=ROOT,
        env={
            **os.environ,
            **environ,
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert message in run.stderr


def test_each_web_process_sends_the_spans_of_its_requests(
    serve: Serve, make_chaos: MakeChaos, collector: Collector
) -> None:
    flags = ("--engine", "process", "--web-processes", "2")
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    server = serve(make_chaos("m"), *flags, **environ)

    first = 0

    def both_have_answered() -> bool:
        """Ask by 16 connections at once; a process that starts later than the other may get none of them."""
        nonlocal first
        everybody = asyncio.Barrier(16)

        async def ask(client: Client, number: int) -> None:
            headers = {"X-Request-Id": str(first + number)}
            assert (await client.post("/predict/m", json.dumps(ROWS).encode(), headers)).status == 200
            await everybody.wait()  # idle connections are spread over the processes

        asyncio.run(with_clients(server.port, 16, ask))
        first += 16
        wait_until(lambda: sum(span.name == "predict" for span in collector.spans()) == first, "all are sent")
        return len(collector.processes()) == 2

    wait_until(both_have_answered, "both processes have sent spans")
    assert server.stop() == 0
    found = [attributes(span)["inferpool.request_id"] for span in collector.spans() if span.name == "predict"]
    assert sorted(found, key=int) == [str(number) for number in range(first)]
    assert len(collector.processes()) == 2
