"""Puts a server of one process together: the models, the predictor, the routes and the server."""

from __future__ import annotations

import socket
import sys
import time
from functools import partial
from pathlib import Path

from inferpool.backends.registry import describe_backends
from inferpool.http.access.trusted_proxies import make_proxies
from inferpool.http.predict.memory_monitor import this_system
from inferpool.http.predict.recorder import RequestRecorder
from inferpool.http.predict.results import ResultDispatcher
from inferpool.http.predict.version_observer import Taker
from inferpool.observe.build_info import build_info
from inferpool.observe.logs import AccessLog, LineHandler
from inferpool.observe.metrics import Metrics
from inferpool.observe.spans import make_spans
from inferpool.pool.router import PoolRouter
from inferpool.repository.catalog import Catalog
from inferpool.repository.local_admin import LocalAdmin
from inferpool.repository.repository import Repository
from inferpool.repository.rollout import RolloutWatch
from inferpool.repository.stores.polling import locate
from inferpool.server import InProcessServer
from inferpool.server_parts import make_server_parts
from inferpool.settings import Settings, with_memory
from inferpool.system.memory import release_freed_memory

GIL_SWITCH_S = 0.001
"""How long a thread that runs Python may keep the event loop waiting; Python's own default is 5 ms."""
SPANS_TIMEOUT_S = 2.0
"""How long the server may take at its end to send the remaining spans."""


def serve(
    listener: socket.socket,
    repository_name: str,
    settings: Settings,
    log_lines: LineHandler,
    taker: Taker | None = None,
) -> tuple[int, bool]:
    """Serve the models in `repository_name` in this process until a signal ends it.

    That is a path, or a reference to a store, whose models are in their folder already.

    Returns the exit status, and whether a thread still loads or runs a model. The status is 0 if every
    accepted request was answered. `log_lines` writes the access log. `taker` takes every request.

    Raises:
        ConfigError: there is nothing to serve, or the variables `OTEL_*` ask for spans that cannot be
            sent, or keys cannot be read.
    """
    sys.setswitchinterval(GIL_SWITCH_S)
    derive = not settings.in_flight_bytes
    settings = with_memory(settings)
    spans = make_spans()
    results = ResultDispatcher()
    metrics = Metrics(build_info(describe_backends()))
    path, origin = locate(repository_name, settings)
    repository = Repository(path, settings, results, metrics, time.monotonic, origin=origin)
    system = this_system(settings.memory_bytes)._replace(trim=partial(_trim, repository.router))
    recorder = RequestRecorder(
        AccessLog(log_lines, every=settings.access_log), spans, make_proxies(settings.trusted_proxies)
    )
    admin = LocalAdmin(repository)
    parts = make_server_parts(
        repository,
        repository.router,
        results,
        metrics,
        settings,
        admin,
        recorder,
        system,
        derive=derive,
        rollouts=RolloutWatch(repository, metrics, admin),
        taker=taker,
    )
    server = InProcessServer(repository, *parts)
    server.run(sockets=[listener])
    if spans is not None:
        spans.close(SPANS_TIMEOUT_S)
    return server.exit_status, repository.is_busy


def _trim(router: PoolRouter) -> bool:
    """Give memory that runtimes keep, and freed memory, back to the kernel; False if there was none."""
    router.release_memory()
    return release_freed_memory()


def load_all(path: Path, settings: Settings, *, remeasure: bool = False) -> Catalog:
    """Load every model in `path` without serving; raises ConfigError if there is nothing to load.

    `remeasure` measures every model again, whatever the cache holds.
    """
    settings = with_memory(settings).model_copy(update={"repository_wait_s": 0.0})
    repository = Repository(
        path, settings, ResultDispatcher(), Metrics({}), time.monotonic, remeasure=remeasure
    )
    repository.load_now()
    return repository
