"""Puts everything together: the models, the predictor, the routes and the server."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from inferpool.backends.registry import describe_backends
from inferpool.engine.supervisor import replace_process
from inferpool.http.access.cors import make_cors
from inferpool.http.access.make_gate import check_exposure, make_gate
from inferpool.http.access.tenants_file import make_tenants
from inferpool.http.application import make_application
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.shared import SharedState
from inferpool.http.predict.memory_monitor import MemoryMonitor, System, in_flight_bytes, this_system
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.recorder import RequestRecorder
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.build_info import build_info
from inferpool.observe.logs import AccessLog, LineHandler
from inferpool.observe.metrics import Metrics
from inferpool.observe.spans import make_spans
from inferpool.repository.catalog import Catalog
from inferpool.repository.local_admin import LocalAdmin
from inferpool.repository.repository import Repository
from inferpool.server import InProcessServer, listen
from inferpool.settings import Settings
from inferpool.system.cpu import usable_cores
from inferpool.system.memory import keep_freed_memory

GIL_SWITCH_S = 0.001
"""How long a thread that runs Python may keep the event loop waiting; Python's own default is 5 ms."""
SPANS_TIMEOUT_S = 2.0
"""How long the server may take at its end to send the remaining spans."""


def serve(path: Path, settings: Settings, log_lines: LineHandler) -> int:
    """Serve the models in `path` until a signal ends the server; returns the exit status.

    The status is 0 if every accepted request was answered. `log_lines` writes the access log.

    Raises:
        ConfigError: `path` has nothing to serve, the address cannot be bound, or the variables
            `OTEL_*` ask for spans that cannot be sent; or keys cannot be read.
    """
    check_exposure(settings)
    # The first step, so that an address in use is reported before anything about the models.
    with listen(settings.host, settings.port) as listener:
        if settings.engine == "process":
            _supervise(listener, path, settings)
        return _serve_on(listener, path, settings, log_lines)


def _supervise(listener: socket.socket, path: Path, settings: Settings) -> NoReturn:
    """Serve from several processes. This one becomes their parent, and imports nothing else."""
    gate, _ = make_gate(settings, time.monotonic, Metrics({}))  # so that wrong keys are reported here
    make_tenants(settings.tenants_file, gate.enabled, Metrics({}))
    system = this_system(settings.memory_bytes)
    derive = not settings.in_flight_bytes
    settings = with_memory(settings, system)
    webs = settings.web_processes or web_processes(usable_cores())
    resolved = settings.model_copy(update={"web_processes": webs})
    replace_process(listener, path, {**resolved.model_dump(mode="json"), "derive": derive})


def web_processes(cores: int) -> int:
    """How many web processes suit `cores`: a model needs the others."""
    return max(1, cores // 4)


def _serve_on(listener: socket.socket, path: Path, settings: Settings, log_lines: LineHandler) -> int:
    keep_freed_memory()
    sys.setswitchinterval(GIL_SWITCH_S)
    system = this_system(settings.memory_bytes)
    derive = not settings.in_flight_bytes
    settings = with_memory(settings, system)
    spans = make_spans()
    results = ResultDispatcher()
    metrics = Metrics(build_info(describe_backends()))
    repository = Repository(path, settings, results, metrics, time.monotonic)
    predictor = Predictor(
        repository,
        repository.router,
        results,
        metrics,
        time.monotonic,
        max_body_bytes=settings.max_body_bytes,
        in_flight_bytes=settings.in_flight_bytes,
        recorder=RequestRecorder(AccessLog(log_lines, every=settings.access_log), spans),
    )
    memory = MemoryMonitor(system, predictor.budget, metrics, derive=derive)
    gate, key_sources = make_gate(settings, time.monotonic, metrics)
    predictor.tenants, tenant_sources = make_tenants(settings.tenants_file, gate.enabled, metrics)
    shared = SharedState(predictor, gate, make_cors(settings.cors_allow_origin))
    results.wrap_batches(shared.writes.begin, shared.writes.flush)
    read_batcher = ReadBatcher()
    application = make_application(repository, shared, read_batcher, metrics, LocalAdmin(repository))
    server = InProcessServer(
        repository,
        application,
        predictor.in_flight,
        results,
        read_batcher,
        metrics,
        memory,
        settings,
        [*key_sources, *tenant_sources],
    )
    server.run(sockets=[listener])
    if spans is not None:
        spans.close(SPANS_TIMEOUT_S)
    if repository.is_busy:
        # The usual exit destroys what a thread that loads or runs still uses; a native library then aborts.
        logging.shutdown()
        os._exit(server.exit_status)
    return server.exit_status


def load_all(path: Path, settings: Settings, *, remeasure: bool = False) -> Catalog:
    """Load every model in `path` without serving; raises ConfigError if there is nothing to load.

    `remeasure` measures every model again, whatever the cache holds.
    """
    settings = with_memory(settings, this_system(settings.memory_bytes))
    repository = Repository(
        path, settings, ResultDispatcher(), Metrics({}), time.monotonic, remeasure=remeasure
    )
    repository.load_now()
    return repository


def with_memory(settings: Settings, system: System) -> Settings:
    """The settings, with the bytes that follow from the memory there is in place of zeros."""
    in_flight = settings.in_flight_bytes or in_flight_bytes(system.limit.limit, system.held())
    return settings.model_copy(
        update={"in_flight_bytes": in_flight, "queue_bytes": settings.queue_bytes or max(1, in_flight // 2)}
    )
