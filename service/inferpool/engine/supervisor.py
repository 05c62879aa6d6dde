"""The parent of all other processes: it listens, answers signals, and starts again what dies.

    supervisor ─┬─ web process 1 … N     read requests, write answers
                ├─ a process for gRPC    passes requests on to web processes; with --grpc-port alone
                ├─ engine 1 … M          hold models, and run them: one or several for each device
                └─ a spare engine        takes the place of the next engine that ends

The supervisor reads no request and loads no library: it has nothing that could crash. It runs one loop,
which never waits for a child. The module is run in place of the command, so the process keeps its id.

`Supervisor` passes messages on to its parts, publishes gauges, ends what is silent, and drains. `WebKeeper`,
`EngineKeeper`, `GrpcKeeper` and `SpareEngine` keep the processes. `EngineFailures` knows what follows when an
engine dies.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from inferpool.engine.admin_relay import AdminRelay
from inferpool.engine.catalog_distribution import CatalogDistribution
from inferpool.engine.catalog_parcel import unpack
from inferpool.engine.catalog_store import CatalogStore
from inferpool.engine.child_loop import ChildLoop, reap
from inferpool.engine.control import Message
from inferpool.engine.device_engines import device_engines
from inferpool.engine.engine_failures import EngineFailures
from inferpool.engine.engine_keeper import EngineKeeper, spawn_engine
from inferpool.engine.grpc_keeper import GrpcKeeper
from inferpool.engine.liveness import Liveness
from inferpool.engine.process_connections import ProcessConnections
from inferpool.engine.spare_engine import LEAST_SPARE_BYTES, SpareEngine
from inferpool.engine.spawn import Child, name_process
from inferpool.engine.supervised import SupervisedEngine, SupervisedWeb
from inferpool.engine.supervisor_metrics import SupervisorMetrics
from inferpool.engine.web_keeper import WebKeeper
from inferpool.observe.logs import configure_logs, report_stopped
from inferpool.pool.token_buckets import MEMORY_BYTES
from inferpool.system.connection_counts import make_counts
from inferpool.system.every_second import until_next
from inferpool.system.listeners import listen_internally, remove_socket_file, socket_file
from inferpool.system.memory import chosen_limit

log = logging.getLogger("inferpool.engine.supervisor")

CLOSE_S: Final = 10.0
"""How long web processes may take to close their connections after the drain timeout."""
PUBLISH_S: Final = 1.0
END_S: Final = 2.0
"""How long an engine may take to end after its own drain timeout."""


class Supervisor:
    """The loop. `run` returns the exit status."""

    def __init__(self, listener: socket.socket, repository: str, settings: Mapping[str, Any]) -> None:
        self._settings = {
            name: value for name, value in settings.items() if name not in ("derive", "engine_devices")
        }
        self._clock = time.monotonic
        self._loop = ChildLoop(self._clock)
        self._liveness = Liveness(settings["silence_timeout_s"], 2 * PUBLISH_S)
        self._webs = {number: SupervisedWeb(number) for number in range(1, settings["web_processes"] + 1)}
        self._engines: dict[str, SupervisedEngine] = {
            name: SupervisedEngine(name, device, number)
            for name, device, number in device_engines(
                settings["engine_devices"], settings["engines_per_device"]
            )
        }
        self._memory_bytes = chosen_limit(settings["memory_bytes"]).limit
        self._metrics = SupervisorMetrics(len(self._webs))
        self._spare = SpareEngine(self._loop, spawn_engine)
        self._store = CatalogStore()
        self._catalog = CatalogDistribution(self._store, self._webs, self._engines)
        self._connections = ProcessConnections(
            self._loop, self._webs, self._engines, settings["in_flight_bytes"]
        )
        # All web processes take connections of the process that serves gRPC. The socket stays open here for
        # those that start later.
        self._forwarded = forwarded = None if settings["grpc_port"] is None else listen_internally()
        rates = memory_file("inferpool-rates", MEMORY_BYTES)
        self._web_keeper = WebKeeper(
            self._loop,
            self._clock,
            self._webs,
            listener,
            make_counts(len(self._webs)),
            [self._metrics.file, rates, *([] if forwarded is None else [forwarded.fileno()])],
            self._settings,
            # Whether the bytes that requests may hold follow from the memory there is.
            {"derive": settings["derive"]},
            started=self._web_started,
            hear=self._hear_web,
            ended=self._web_ended,
            restarted=lambda: self._metrics.count("web_restarts_total"),
            gave_up=self._give_up,
        )
        self._engine_keeper = EngineKeeper(
            self._loop,
            self._clock,
            self._engines,
            self._store,
            self._catalog,
            self._connections,
            self._spare,
            self._metrics,
            repository,
            self._settings,
            hear=self._hear_engine,
            ended=self._engine_ended,
        )
        self._failures = EngineFailures(
            self._loop,
            self._clock,
            self._engines,
            self._store,
            self._catalog,
            self._connections,
            self._engine_keeper,
            self._metrics,
            settings["load_timeout_s"],
        )
        self._admin = AdminRelay(
            self._store, self._engines, self._web_keeper.answer, self._engine_keeper.allow
        )
        self._draining = False
        self._drain_ends = 0.0
        self._draining_engines = False
        self._status: int | None = None
        self._exit_status = 0
        self._grpc: GrpcKeeper | None = None
        if forwarded is not None:
            self._metrics.expect_grpc()
            self._grpc = GrpcKeeper(
                self._loop,
                self._clock,
                self._settings,
                forwarded.getsockname().decode(),
                lambda: self._metrics.count("grpc_restarts_total"),
                self._refuse,
                {"slot": self._metrics.grpc_slot},
                [self._metrics.file],
            )

    def run(self) -> int:
        """Serve until a signal ends the server; the status is 0 if every accepted request was answered."""
        self._loop.watch_signals(self._answer_signal)
        self._publish()
        self._web_keeper.start_all()
        self._engine_keeper.start_due()
        if self._grpc is not None:
            self._grpc.start()
        while self._status is None:
            self._loop.turn(self._children())
        for child in self._children():
            child.kill()
            child.process.wait()
        return self._status

    # Web processes.

    def _web_started(self, web: SupervisedWeb) -> None:
        self._catalog.send(web)
        self._connections.connect_web(web)

    def _hear_web(self, web: SupervisedWeb, message: Message) -> None:
        values = message.values
        if message.kind == "seen":
            self._catalog.seen(web, values)
        elif message.kind == "admin":
            self._admin.ask(web.number, values, draining=self._draining)
        elif message.kind == "crashed":
            self._failures.reported(web.number, values)
        elif message.kind == "broken":
            self._engine_keeper.end_broken(values["engine"], values["epoch"])
        elif message.kind == "refused":
            self._refuse(values["reason"])

    def _web_ended(self, web: SupervisedWeb) -> None:
        self._catalog.web_ended(web)
        self._connections.web_ended(web)
        self._admin.web_ended(web.number)
        self._failures.web_ended(web.number)

    # Engines.

    def _hear_engine(self, engine: SupervisedEngine, message: Message) -> None:
        values = message.values
        if message.kind == "loading":
            self._failures.load_begun(engine, (values["model"], values["version"]))
        elif message.kind == "hello":
            self._web_keeper.set_info(values["info"])
        elif message.kind == "models":
            self._take_catalog(engine, message.descriptors[0])
        elif message.kind == "loaded":
            engine.loaded = True
            self._engine_keeper.answer_again(engine)
            self._engine_keeper.start_due()
            if self._memory_bytes >= LEAST_SPARE_BYTES:
                self._spare.plan(values["backends"])
            self._catalog.loaded(engine)
        elif message.kind == "answer":
            self._admin.take_answer(engine.name, values)
        elif message.kind == "await_seen":
            self._catalog.await_seen(engine)
        elif message.kind == "refused":
            self._refuse(values["reason"])
        elif message.kind == "rescanned":
            engine.rescan_due = False
        elif message.kind == "hung":
            log.error("engine %s ends: %s/%d: %s", engine.name, *values["version"], values["reason"])
            engine.hung.add((values["version"][0], values["version"][1]))
        elif message.kind == "drained" and not values["ok"]:
            log.error("a model was still running when the drain timeout ended")
            self._exit_status = 1

    def _take_catalog(self, engine: SupervisedEngine, descriptor: int) -> None:
        try:
            parcel = unpack(descriptor)
        except ValueError as error:
            log.error("engine %s sent a catalog that cannot be read: %s", engine.name, error)
            return
        self._store.take(engine.name, parcel.catalog, parcel.files)
        self._failures.take_catalog(engine, parcel.catalog)
        self._catalog.changed()
        self._engine_keeper.answer_again(engine)
        self._catalog.tell_decisions(engine)
        self._engine_keeper.need_devices(parcel.catalog["devices"])
        self._admin.take_jobs(engine.name, parcel.catalog["jobs"])
        if engine.parent is not None and all(
            view["state"] == "unloaded"
            for model in parcel.catalog["models"].values()
            for view in model["versions"].values()
        ):
            log.info("engine %s ends: its version is unloaded", engine.name)
            self._engine_keeper.remove(engine)

    def _engine_ended(self, engine: SupervisedEngine) -> None:
        assert engine.child is not None
        how = reap(engine.child)
        status = engine.child.process.returncode
        engine.child = None
        if self._draining_engines:
            if status != 0 and engine.told:
                log.error("engine %s %s while it drained", engine.name, how)
                self._exit_status = 1
            self._end_if_drained()
            return
        if self._engines.get(engine.name) is not engine:
            self._engine_keeper.forget(engine)
        else:
            self._failures.ended(engine, how)
        self._admin.engine_ended(engine.name)

    # Gauges and silent processes.

    def _publish(self) -> None:
        """Publish the gauges of the supervisor, and end silent processes, again and again."""
        now = self._clock()
        self._metrics.publish(now, self._connections.arenas())
        self._end_silent(now)
        self._loop.after(until_next(now), self._publish)

    def _end_silent(self, now: float) -> None:
        """End processes that show no sign of life; what they had goes to their successors."""
        if self._draining:
            return  # the drain has a timeout of its own
        watched: dict[int, tuple[str, Child, float]] = {}
        for web in self._webs.values():
            if web.child is not None:
                beat = self._metrics.web_beat(web.number, web.child.pid)
                watched[web.child.pid] = (f"web process {web.number}", web.child, beat)
        for engine in self._engines.values():
            engine_beat = self._metrics.engine_beat(engine.name, engine.pid)
            if engine.child is not None and engine_beat is not None and not engine.loading:
                watched[engine.pid] = (f"engine {engine.name}", engine.child, engine_beat)
        if self._grpc is not None and (grpc := self._grpc.child) is not None:
            watched[grpc.pid] = ("the process of gRPC", grpc, self._metrics.grpc_beat(grpc.pid))
        silent = self._liveness.look(now, {pid: beat for pid, (_, _, beat) in watched.items()})
        for pid, seconds in silent.items():
            what, child, _ = watched[pid]
            text = "%s (process %d) has shown no sign of life for %.1f s, and is ended"
            log.error(text, what, pid, seconds)
            child.kill()

    # The end.

    def _answer_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            log.info("SIGHUP: looking at the models folder again; changed settings need a restart")
            self._engine_keeper.rescan()
        elif self._draining:
            log.warning("%s: stopping at once, without the requests that are not answered yet", number.name)
            self._status = 1
        else:
            log.info("%s: draining", number.name)
            self._drain()

    def _drain(self) -> None:
        self._draining = True
        self._spare.stop()
        settle_s, timeout_s = self._settings["drain_settle_s"], self._settings["drain_timeout_s"]
        self._drain_ends = self._clock() + settle_s + timeout_s
        if settle_s:
            self._loop.after(settle_s, lambda: log.info("the settle time is over: new requests are refused"))
        self._loop.after(settle_s + timeout_s + CLOSE_S, self._web_keeper.kill_all)
        self._web_keeper.drain(self._drain_engines)
        if self._grpc is not None:
            self._grpc.drain(settle_s, timeout_s, self._end_if_drained)

    def _drain_engines(self) -> None:
        """End the engines: every accepted request has its response, or never gets one."""
        if self._draining_engines:
            return
        self._draining_engines = True
        self._connections.close()
        # Even without time left, idle instance threads need a moment to end.
        timeout_s = max(1.0, self._drain_ends - self._clock())
        self._engine_keeper.drain(timeout_s)
        self._end_if_drained()
        self._loop.after(timeout_s + END_S, self._engine_keeper.kill_all)

    def _end_if_drained(self) -> None:
        """End the server once the engines and the process of gRPC have ended, in a drain."""
        waited_for = [engine.child for engine in self._engines.values()]
        if self._grpc is not None:
            waited_for.append(self._grpc.child)
        if self._draining_engines and not any(waited_for):
            self._status = max(self._exit_status, self._web_keeper.exit_status)

    def _give_up(self) -> None:
        """End because web processes end before they listen."""
        self._status = 1

    def _refuse(self, reason: str) -> None:
        """End because the settings or the folder of models allow no service."""
        if self._status is None:
            logging.shutdown()
            sys.stderr.write(f"inferpool: {reason}\n")
            self._status = 1

    def _children(self) -> list[Child]:
        owners: list[SupervisedWeb | SupervisedEngine | SpareEngine | GrpcKeeper] = [
            *self._webs.values(),
            *self._engines.values(),
            self._spare,
        ]
        if self._grpc is not None:
            owners.append(self._grpc)
        return [owner.child for owner in owners if owner.child is not None]


def memory_file(name: str, nbytes: int) -> int:
    """The descriptor of new memory of `nbytes` bytes, which children map."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(file, nbytes)
    return file


def replace_process(listener: socket.socket, repository: str, settings: Mapping[str, Any]) -> NoReturn:
    """Become the supervisor: what this process has imported so far is gone, its id stays."""
    plan = os.memfd_create("inferpool-settings", 0)
    os.write(plan, json.dumps({"repository": repository, "settings": settings}).encode())
    listener.set_inheritable(True)
    command = [sys.executable, "-m", "inferpool.engine.supervisor", str(listener.fileno()), str(plan)]
    logging.shutdown()
    os.execv(sys.executable, command)


def main() -> int:
    """Run the supervisor that `replace_process` has started."""
    listener, plan = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(listener, False)
    size = os.fstat(plan).st_size
    values = json.loads(os.pread(plan, size, 0))
    os.close(plan)
    settings = values["settings"]
    name_process("inferpool")
    configure_logs(settings["log_level"], settings["log_format"], process="supervisor")
    with socket.socket(fileno=listener) as inherited:
        file = socket_file(inherited)
        status = Supervisor(inherited, values["repository"], settings).run()
    remove_socket_file(file)
    report_stopped(status)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
