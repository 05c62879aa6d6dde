"""The life of a process that answers requests: it starts, serves, drains, and stops.

`InProcessServer` also has the models, and answers signals. `inferpool.web_process` has the other kind, whose
models are in engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import inferpool.http.uvicorn_import  # noqa: F401

# isort: split
import uvicorn

from inferpool.engine.grpc_keeper import EventLoopWatcher, GrpcKeeper
from inferpool.engine.spawn import SUPERVISED
from inferpool.errors import ConfigError
from inferpool.http.access.admin_socket import ADMIN_SOCKET, open_admin_socket
from inferpool.http.access.make_gate import KeySource
from inferpool.http.access.tls import Certificates, wait_for_certificates
from inferpool.http.application import Application
from inferpool.http.connection.acceptor import Acceptor
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.forwarded import ForwardedProtocol
from inferpool.http.connection.protocol import PredictProtocol
from inferpool.http.predict.in_flight import InFlight
from inferpool.http.predict.memory_monitor import MemoryMonitor
from inferpool.http.predict.observations import Observations
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.build_info import hot_path
from inferpool.observe.gpu_metrics import gpu_readings
from inferpool.observe.metrics import Metrics, Sample
from inferpool.repository.catalog_readings import uses_gpus
from inferpool.repository.rollout import RolloutWatch
from inferpool.settings import Settings
from inferpool.system.connection_counts import ConnectionCounts, make_counts
from inferpool.system.every_second import EverySecond, until_next
from inferpool.system.gpus import CPU, cuda_driver
from inferpool.system.listeners import address_of, listen_internally
from inferpool.wire import json_numbers

if TYPE_CHECKING:
    from inferpool.repository.repository import Repository  # a web process imports no loader

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5
"""How long connections may take to close once every request on them is answered."""

FIRST_CLOSE_LOOK_S = 0.001
LONGEST_CLOSE_LOOK_S = 0.1
"""Pauses between two looks whether all connections are closed."""

BODY_GRACE_S = 2.0
"""How long a client may take to complete a request body after draining begins."""


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops.

    Attributes:
        counts: how many connections this process and others of the server have.
        forwarded: takes connections of the process that serves gRPC; None without gRPC.
        exit_status: 0 if every accepted request was answered, else 1; valid after `run` returns.
        loop: the event loop, once the server has one.
        name: what metrics call this process.
    """

    name = "web-1"

    def __init__(
        self,
        application: Application,
        in_flight: InFlight,
        results: ResultDispatcher,
        read_batcher: ReadBatcher,
        metrics: Metrics,
        memory: MemoryMonitor,
        settings: Settings,
        key_sources: Sequence[KeySource] = (),
        rollouts: RolloutWatch | None = None,
        observations: Observations | None = None,
    ) -> None:
        """`rollouts` ends canaries; None if another process of the server does.

        `observations` has samples that are to be written before the end.
        """
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
            timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        self.loop: asyncio.AbstractEventLoop | None = None
        self._ending = asyncio.Event()
        super().__init__(config)
        self.exit_status = 0
        self._in_flight = in_flight
        self._results = results
        self._read_batcher = read_batcher
        self._memory = memory
        self._metrics = metrics
        self._settings = settings
        self._key_sources = key_sources
        self._rollouts = rollouts
        self._observations = observations
        self._certificates: Certificates | None = None
        self._draining: asyncio.Task[None] | None = None
        self._acceptor: Acceptor | None = None
        self.forwarded: socket.socket | None = None
        self.counts = ConnectionCounts(make_counts(1), 0, 1)
        self.has_admin_socket = settings.admin_socket is not None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the server has drained; until a model is loaded, its requests are answered 503."""
        self.loop = asyncio.get_running_loop()
        self._results.attach(self.loop)
        self._metrics.add_source(web_busy(self._metrics, threading.current_thread(), self.name))
        every_second = EverySecond(
            {"looking at the memory": self._memory.look, "publishing the gauges": self._metrics.publish}
        )
        every_second.start()
        for source in self._key_sources:
            source.start(self.loop)
        self.begin(sockets or [])
        admin = await self._open_admin_socket()
        if self._rollouts is not None:
            self._rollouts.start()
        await super().serve(sockets)
        if admin is not None:
            admin.close()
            assert self._settings.admin_socket is not None
            with contextlib.suppress(OSError):
                self._settings.admin_socket.unlink()
        if self._rollouts is not None:
            self._rollouts.close()
        if self._observations is not None:
            await asyncio.to_thread(self._observations.close)
        await asyncio.to_thread(every_second.close)
        self._memory.close()
        for source in self._key_sources:
            source.close()
        self._read_batcher.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        assert self.loop is not None
        assert sockets is not None
        await self.wait_informed()
        self._certificates = await wait_for_certificates(self._settings)
        if self._certificates is not None:
            self._metrics.add_source(self._certificates.readings)
        await self.lifespan.startup()
        config, connections, settings = self.config, self.server_state.connections, self._settings
        make_protocol = partial(
            PredictProtocol,
            config=config, server_state=self.server_state, app_state=self.lifespan.state, _loop=self.loop,
        )  # fmt: skip
        self._acceptor = Acceptor(
            self.loop,
            sockets[0],
            make_protocol,
            lambda: len(connections),
            self.counts,
            self._metrics,
            self._certificates,
            settings.connections_per_address,
        )
        self.servers = [self._acceptor]  # type: ignore[list-item]
        if self.forwarded is not None:
            self.servers.append(self._accept_forwarded(self.forwarded))  # type: ignore[arg-type]
        self.started = True
        self.report_listening()

    def _accept_forwarded(self, listener: socket.socket) -> Acceptor:
        """Accept connections of the process that serves gRPC."""
        assert self.loop is not None
        connections = self.server_state.connections

        def make_protocol(state: dict[str, Any]) -> PredictProtocol:
            return PredictProtocol(self.config, self.server_state, state, self.loop)

        return Acceptor(
            self.loop,
            listener,
            partial(ForwardedProtocol, make_protocol),
            lambda: len(connections),
            self.counts,
            self._metrics,
        )

    async def main_loop(self) -> None:
        """Renew the date of responses once a second until the server ends.

        uvicorn's own loop looks ten times a second whether it should end.
        """
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until_next(time.monotonic())):
                    await self._ending.wait()

    @property
    def should_exit(self) -> bool:
        """Whether the server is to end, as uvicorn asks it; any thread may set it."""
        return self._should_exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._should_exit = value
        if value and self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._ending.set)

    async def wait_informed(self) -> None:
        """Wait until this process knows what is served."""

    def report_listening(self) -> None:
        """Report that connections are accepted."""

    async def _open_admin_socket(self) -> asyncio.Server | None:
        """Answer requests that come over the admin socket, if this process has one."""
        path = self._settings.admin_socket
        if path is None or not self.has_admin_socket:
            return None
        assert self.loop is not None
        config, state = self.config, self.server_state
        if not config.loaded:
            config.load()
        make_protocol: Callable[[], asyncio.Protocol] = partial(
            PredictProtocol,
            config=config,
            server_state=state,
            app_state={ADMIN_SOCKET: True},
            _loop=self.loop,
        )
        try:
            return await self.loop.create_unix_server(make_protocol, sock=open_admin_socket(path))
        except ConfigError as error:
            log.error("%s", error.detail)
            return None

    def begin(self, listeners: list[socket.socket]) -> None:
        """Do what has to be done once the loop runs; the next step is to accept connections."""
        raise NotImplementedError

    def report_drain(self) -> None:
        """Report that the server is not ready."""
        raise NotImplementedError

    async def drain_models(self, timeout_s: float) -> bool:
        """End the models, which have no request any more; False if `timeout_s` is too short."""
        raise NotImplementedError

    def begin_drain(self) -> None:
        """Answer the accepted requests, then stop; the second call stops at once."""
        if self._draining is not None or self.loop is None:
            self.should_exit = self.force_exit = True
            self.exit_status = 1
            return
        self._in_flight.closing = True
        self.report_drain()
        self._draining = self.loop.create_task(self._drain())

    async def _drain(self) -> None:
        """Give load balancers time to notice, answer the accepted requests, then stop."""
        if self._settings.drain_settle_s:
            await asyncio.sleep(self._settings.drain_settle_s)
            # Idle connections are closed before the first refusal: a client whose connection is closed
            # connects to another server, but a refusal would be a failed request.
            for connection in list(self.server_state.connections):
                connection.shutdown()
            self.report_settled()
        self._in_flight.draining = True
        deadline = time.monotonic() + self._settings.drain_timeout_s
        try:
            await asyncio.wait_for(self._in_flight.wait_idle(BODY_GRACE_S), self._settings.drain_timeout_s)
        except TimeoutError:
            log.error("%d requests were not answered in time", self._in_flight.accepted)
            self.exit_status = 1 if self._in_flight.accepted else 0
        # Even without time left, idle instance threads need a moment to end.
        left_s = max(1.0, deadline - time.monotonic())
        if not await self.drain_models(left_s):
            log.error("a model was still running when the drain timeout ended")
            self.exit_status = 1
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners and all connections; uvicorn's own takes a tenth of a second at least."""
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        connections, tasks = self.server_state.connections, self.server_state.tasks
        for connection in list(connections):
            connection.shutdown()
        deadline, pause_s = time.monotonic() + CLOSE_TIMEOUT_S, FIRST_CLOSE_LOOK_S
        await asyncio.sleep(0)  # for the end of idle connections
        while (connections or tasks) and not self.force_exit:
            if time.monotonic() > deadline:
                log.error("%d connections were not closed in time", len(connections))
                for task in tasks:
                    task.cancel()
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_CLOSE_LOOK_S)

    def report_settled(self) -> None:
        """Report that new requests are refused from now on."""
        log.info("the settle time is over: new requests are refused")


class InProcessServer(Server):
    """The whole server in one process: it loads models when it starts, and drains at the first signal."""

    def __init__(self, repository: Repository, *parts: Any) -> None:
        """`parts` are the arguments of `Server`."""
        super().__init__(*parts)
        self._repository = repository
        self._gpus_watched = False
        self._frozen = False
        self._grpc: GrpcKeeper | None = None
        self._grpc_ended = asyncio.Event()

    def begin(self, listeners: list[socket.socket]) -> None:
        """Answer signals and load the models."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn does this as well, but only after the line that says that the server listens.
            signal.signal(number, self.handle_exit)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._rescan)
        for listener in listeners:
            log.info(
                "listening on %s", address_of(listener, tls=self._settings.tls_certificate_file is not None)
            )
        report_installation()
        self._start_grpc()
        # Signals have waited since the server listens. Threads, and children of theirs, inherit the mask.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISED)
        self._repository.start(self._loaded, self._end_without_models)

    def _start_grpc(self) -> None:
        if self._settings.grpc_port is None:
            return
        assert self.loop is not None
        self.forwarded = listen_internally()
        self._grpc = GrpcKeeper(
            EventLoopWatcher(self.loop),
            time.monotonic,
            self._settings.model_dump(mode="json"),
            self.forwarded.getsockname().decode(),
            self._metrics.value("grpc_restarts_total").add,
            self._end_without_models,
        )
        self._grpc.start()

    def _end_without_models(self, reason: str) -> None:
        """End the server: no models have come in time, or gRPC cannot listen."""
        log.error("%s", reason)
        self.exit_status = 1
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at once at the second."""
        self._answer_in_loop(self._exit, sig)

    def _rescan(self, sig: int, frame: FrameType | None) -> None:
        """Look at the models folder again; the signal never ends the server."""
        self._answer_in_loop(self._look_again)

    def _answer_in_loop(self, answer: Callable[..., None], *arguments: int) -> None:
        """Answer a signal between two callbacks of the event loop.

        A handler runs between any two steps of the main thread. If that thread holds a lock at this moment,
        for example that of the log, a handler that needs the same lock waits for itself for ever.
        """
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(answer, *arguments)

    def _exit(self, sig: int) -> None:
        name = signal.Signals(sig).name
        if self._draining is None:
            log.info("%s: draining", name)
        else:
            log.warning("%s: stopping at once, without the requests that are not answered yet", name)
        self.begin_drain()

    def _look_again(self) -> None:
        log.info("SIGHUP: looking at the models folder again; changed settings need a restart")
        self._repository.watch.look()

    def report_drain(self) -> None:
        """Report that the server is not ready."""
        self._repository.begin_drain()
        if self._grpc is not None:
            settings = self._settings
            self._grpc.drain(settings.drain_settle_s, settings.drain_timeout_s, self._grpc_ended.set)

    async def drain_models(self, timeout_s: float) -> bool:
        """End every instance; False if `timeout_s` is too short."""
        ended = await asyncio.to_thread(self._repository.drain, timeout_s)
        if self._grpc is not None:
            await self._grpc_ended.wait()  # it hands on the last responses
        return ended

    def _loaded(self) -> None:
        if not self._frozen:
            # Most loaded models live as long as the process: the garbage collector need not traverse them.
            # Later loads leave that alone, because requests would wait.
            gc.collect()
            gc.freeze()
            self._frozen = True
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
        if uses_gpus(self._repository) and (readings := gpu_readings(cuda_driver().gpus())) is not None:
            self._metrics.add_source(readings)
            self._gpus_watched = True


def report_installation() -> None:
    """Log what this installation lacks."""
    if hot_path() == "interpreted":
        log.info("the hot path is interpreted and slower: this installation is not compiled")
    if not json_numbers.AVAILABLE:
        log.warning(
            "large JSON bodies delay other requests: this installation lacks the C module that reads"
            " them; install a C compiler and reinstall Inferpool"
        )


def web_busy(metrics: Metrics, thread: threading.Thread, process: str) -> Callable[[], list[Sample]]:
    """A source of `web_busy_seconds_total`: how long `thread`, the event loop of the web `process`, was busy.

    The thread is also busy while it waits for a core that others use. The source goes on from what a
    predecessor of this process has published in `metrics`.
    """
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    before = metrics.left_behind("web_busy_seconds_total", process)
    schedule = Path(f"/proc/self/task/{thread.native_id}/schedstat")

    waited = 0.0

    def busy() -> list[Sample]:
        nonlocal waited
        # The file cannot be read while the process has no descriptors left, and a counter never falls.
        waited = max(waited, core_wait_s(schedule))
        seconds = before + time.clock_gettime(clock) + waited
        return [("web_busy_seconds_total", (process,), seconds)]

    return busy


def core_wait_s(schedule: Path) -> float:
    """The seconds that a thread has waited for a core, as its `schedstat` says; 0.0 if there is none."""
    try:
        _, waited_ns, _ = schedule.read_text().split()
        return int(waited_ns) / 1e9
    except (OSError, ValueError):
        return 0.0
