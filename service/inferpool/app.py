"""Puts everything together, starts it in order, and stops it in reverse."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from inferpool import __version__, tensors
from inferpool.backends.base import backend_names, find_backend
from inferpool.errors import ConfigError, LoadError
from inferpool.http.application import make_application
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.protocol import PredictProtocol
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.recorder import RequestRecorder
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.gpu_metrics import gpu_readings
from inferpool.observe.logs import AccessLog, LineHandler
from inferpool.observe.metrics import Metrics, Sample
from inferpool.observe.spans import make_spans
from inferpool.repository.catalog import Catalog
from inferpool.repository.repository import Repository
from inferpool.settings import Settings
from inferpool.system.cpu import keep_freed_memory
from inferpool.system.gpus import CPU, cuda_driver
from inferpool.wire import json_numbers

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5
"""How long connections may take to close once every request on them is answered."""

BODY_GRACE_S = 2.0
"""How long a request whose body is still coming in may take to be complete once the server drains."""

SPANS_S = 2.0
"""How long the spans that requests left behind may take to be sent at the end."""


def serve(path: Path, settings: Settings, lines: LineHandler) -> int:
    """Serve the models in `path` until a signal ends it; the exit status is 0 if nothing was lost.

    `lines` is where log lines go. Raises ConfigError if there is nothing to serve, the address cannot be
    had, or spans are asked for that cannot be sent.
    """
    keep_freed_memory()
    access = AccessLog(lines, every=settings.access_log)
    spans = make_spans()
    outlet = ResultDispatcher()
    metrics = Metrics(build_info())
    repository = Repository(path, settings, outlet, metrics, time.monotonic)
    predictor = Predictor(
        repository,
        repository.engine,
        outlet,
        metrics,
        time.monotonic,
        max_body_bytes=settings.max_body_bytes,
        in_flight_bytes=settings.in_flight_bytes,
        recorder=RequestRecorder(access, spans),
    )
    muster = ReadBatcher()
    config = uvicorn.Config(
        make_application(repository, predictor, muster, metrics),
        # Named, not "auto": without them every request costs four times as much, and silently.
        http=PredictProtocol,
        loop="uvloop",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        # Load balancers keep idle connections for a minute; closing first would fail their next request.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )
    with _listen(settings.host, settings.port) as listener:
        server = _Server(
            config,
            repository,
            predictor,
            outlet,
            muster,
            metrics,
            settings.drain_settle_s,
            settings.drain_timeout_s,
        )
        server.run(sockets=[listener])
    if spans is not None:
        spans.close(SPANS_S)
    return server.exit_status


def load_all(path: Path, settings: Settings) -> Catalog:
    """Load everything in `path`, serve nothing; raises ConfigError if there is nothing to serve."""
    repository = Repository(path, settings, ResultDispatcher(), Metrics({}), time.monotonic)
    repository.load_now()
    return repository


class _Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops."""

    def __init__(
        self,
        config: uvicorn.Config,
        repository: Repository,
        predictor: Predictor,
        outlet: ResultDispatcher,
        muster: ReadBatcher,
        metrics: Metrics,
        drain_settle_s: float,
        drain_timeout_s: float,
    ) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._repository = repository
        self._predictor = predictor
        self._outlet = outlet
        self._muster = muster
        self._metrics = metrics
        self._drain_settle_s = drain_settle_s
        self._drain_timeout_s = drain_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._gpus_watched = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to load, and answer from the start: who asks too early is told so."""
        self._loop = asyncio.get_running_loop()
        self._outlet.attach(self._loop)
        self._metrics.add_source(web_busy(threading.get_ident()))
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if hot_path() == "interpreted":
            log.info("the hot path runs interpreted, more slowly: this installation was not compiled")
        if not json_numbers.AVAILABLE:
            log.warning("large JSON holds up other requests: Inferpool was installed without a C compiler")
        self._repository.start(self._loaded)
        await super().serve(sockets)
        self._muster.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops at once."""
        if self._draining is not None or self._loop is None:
            self.should_exit = self.force_exit = True
            self.exit_status = 1
            return
        log.info("%s: draining", signal.Signals(sig).name)
        self._predictor.parting = True
        self._repository.begin_drain()
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        """Let the load balancers notice, answer what was accepted, then stop."""
        if self._drain_settle_s:
            await asyncio.sleep(self._drain_settle_s)
            # Who is quiet is hung up on before anything is refused: a client that finds its connection
            # closed asks elsewhere, and a refusal would be a failed request.
            for connection in list(self.server_state.connections):
                connection.shutdown()
            log.info("settled: requests are refused from here on")
        self._predictor.draining = True
        deadline = time.monotonic() + self._drain_timeout_s
        try:
            await asyncio.wait_for(self._predictor.idle(BODY_GRACE_S), self._drain_timeout_s)
        except TimeoutError:
            log.error("%d requests were not answered in time", self._predictor.accepted)
            self.exit_status = 1 if self._predictor.accepted else 0
        # Idle threads need a moment to notice, however little time is left.
        left_s = max(1.0, deadline - time.monotonic())
        if not await asyncio.to_thread(self._repository.drain, left_s):
            log.error("a model was still running at the end")
            self.exit_status = 1
        self.should_exit = True

    def _loaded(self) -> None:
        # What is loaded stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        self._watch_gpus()
        health = self._repository.health()
        for name, problem in health.problems.items():
            log.warning("%s: %s", name, problem)
        log.info("%s: %d models", health.status, len(self._repository.models()))

    def _watch_gpus(self) -> None:
        """Export what the GPUs tell that models run on; what came late may be the first that does."""
        if self._gpus_watched:
            return
        catalog = self._repository
        versions = [version for model in catalog.models().values() for version in model.versions.values()]
        used = {instance.device for version in versions for instance in catalog.live(version.key).instances}
        if used - {CPU} and (readings := gpu_readings(cuda_driver().gpus())) is not None:
            self._metrics.add_source(readings)
            self._gpus_watched = True


def web_busy(thread: int) -> Callable[[], list[Sample]]:
    """A source of `web_busy_seconds_total`: the CPU time of `thread`, read by whoever scrapes."""
    clock = time.pthread_getcpuclockid(thread)
    return lambda: [("web_busy_seconds_total", (), time.clock_gettime(clock))]


def hot_path() -> str:
    """Return `compiled` or `interpreted`: how the modules that every request passes through run."""
    return "interpreted" if tensors.__file__.endswith(".py") else "compiled"


def build_info() -> dict[str, str]:
    """What `build_info` says: how the hot path runs, the versions of Inferpool, Python and the runtimes."""
    info = {"version": __version__, "python": platform.python_version(), "hot_path": hot_path()}
    for name in backend_names():
        try:
            info[name] = find_backend(name).describe()
        except LoadError:
            info[name] = "not installed"
    return info


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from error
