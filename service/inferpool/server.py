"""The life of the server: it listens, loads the models, drains at the first signal, and stops."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from inferpool.errors import ConfigError
from inferpool.http.application import Application
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.protocol import PredictProtocol
from inferpool.http.predict.in_flight import InFlight
from inferpool.http.predict.memory_monitor import MemoryMonitor
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.build_info import hot_path
from inferpool.observe.gpu_metrics import gpu_readings
from inferpool.observe.metrics import Metrics, Sample
from inferpool.repository.repository import Repository
from inferpool.settings import Settings
from inferpool.system.gpus import CPU, cuda_driver
from inferpool.wire import json_numbers

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5
"""How long connections may take to close once every request on them is answered."""

BODY_GRACE_S = 2.0
"""How long a client may take to complete a request body after draining begins."""

KEEP_ALIVE_S = 75
"""How long idle connections stay open, in seconds.

Load balancers keep idle connections for a minute; if the server closed first, their next request would fail.
"""

BACKLOG = 4096
"""Connections that the kernel may hold until the server accepts them."""


class Server(uvicorn.Server):
    """uvicorn's server, which loads models when it starts and drains before it stops.

    Attributes:
        exit_status: 0 if every accepted request was answered, else 1; valid after `run` returns.
    """

    def __init__(
        self,
        application: Application,
        repository: Repository,
        in_flight: InFlight,
        results: ResultDispatcher,
        read_batcher: ReadBatcher,
        metrics: Metrics,
        memory: MemoryMonitor,
        settings: Settings,
    ) -> None:
        config = uvicorn.Config(
            application,
            # Named, not "auto": uvicorn would fall back without a word if one of the two were missing,
            # and each request would cost four times as much.
            http=PredictProtocol,
            loop="uvloop",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        super().__init__(config)
        self.exit_status = 0
        self._repository = repository
        self._in_flight = in_flight
        self._results = results
        self._read_batcher = read_batcher
        self._metrics = metrics
        self._memory = memory
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._gpus_watched = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models while serving: until a model is loaded, its requests are answered 503."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn does this as well, but only after the line that says that the server listens.
            signal.signal(number, self.handle_exit)
        self._results.attach(self._loop)
        self._metrics.add_source(web_busy(self._metrics, threading.get_ident()))
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if hot_path() == "interpreted":
            log.info("the hot path is interpreted and slower: this installation is not compiled")
        if not json_numbers.AVAILABLE:
            log.warning(
                "large JSON bodies delay other requests: this installation lacks the C module that reads"
                " them; install a C compiler and reinstall Inferpool"
            )
        self._memory.start()
        self._repository.start(self._loaded)
        await super().serve(sockets)
        self._memory.close()
        self._read_batcher.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at once at the second."""
        if self._draining is not None or self._loop is None:
            self.should_exit = self.force_exit = True
            self.exit_status = 1
            return
        log.info("%s: draining", signal.Signals(sig).name)
        self._in_flight.closing = True
        self._repository.begin_drain()
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        """Give load balancers time to notice, answer the accepted requests, then stop."""
        if self._settings.drain_settle_s:
            await asyncio.sleep(self._settings.drain_settle_s)
            # Idle connections are closed before the first refusal: a client whose connection is closed
            # connects to another server, but a refusal would be a failed request.
            for connection in list(self.server_state.connections):
                connection.shutdown()
            log.info("the settle time is over: new requests are refused")
        self._in_flight.draining = True
        deadline = time.monotonic() + self._settings.drain_timeout_s
        try:
            await asyncio.wait_for(self._in_flight.wait_idle(BODY_GRACE_S), self._settings.drain_timeout_s)
        except TimeoutError:
            log.error("%d requests were not answered in time", self._in_flight.accepted)
            self.exit_status = 1 if self._in_flight.accepted else 0
        # Even without time left, idle instance threads need a moment to end.
        left_s = max(1.0, deadline - time.monotonic())
        if not await asyncio.to_thread(self._repository.drain, left_s):
            log.error("a model was still running when the drain timeout ended")
            self.exit_status = 1
        self.should_exit = True

    def _loaded(self) -> None:
        # Loaded models live as long as the process: the garbage collector need not traverse them.
        gc.collect()
        gc.freeze()
        self._watch_gpus()
        # A later load may use a GPU that no model uses yet.
        on_cpu = self._settings.devices == (CPU,) or not cuda_driver().gpus()
        self._memory.settle(bound_data=on_cpu)
        health = self._repository.health()
        for name, problem in health.problems.items():
            log.warning("%s: %s", name, problem)
        log.info("%s: %d models", health.status, len(self._repository.models()))

    def _watch_gpus(self) -> None:
        """Export the readings of the GPUs once a model runs on one; a later load may be the first."""
        if self._gpus_watched:
            return
        catalog = self._repository
        versions = [version for model in catalog.models().values() for version in model.versions.values()]
        used = {instance.device for version in versions for instance in catalog.live(version.key).instances}
        if used - {CPU} and (readings := gpu_readings(cuda_driver().gpus())) is not None:
            self._metrics.add_source(readings)
            self._gpus_watched = True


def web_busy(metrics: Metrics, thread: int, process: str = "web-0") -> Callable[[], list[Sample]]:
    """A source of `web_busy_seconds_total`: the CPU time of `thread`, the event loop of the web `process`.

    The source goes on from what a predecessor of this process has published in `metrics`.
    """
    clock = time.pthread_getcpuclockid(thread)
    before = metrics.left_behind("web_busy_seconds_total", process)
    return lambda: [("web_busy_seconds_total", (process,), before + time.clock_gettime(clock))]


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free port. Raises ConfigError if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        remedy = "--host and --port choose another address"
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; {remedy}") from error
