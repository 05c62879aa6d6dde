"""The parent of all other processes: it listens, answers signals, and starts again what dies.

    supervisor ─┬─ web process 1 … N     read requests, write answers
                ├─ a process for gRPC    passes requests on to web processes; with --grpc-port alone
                ├─ engine 1 … M          hold models, and run them: one or several for each device
                └─ a spare engine        takes the place of the next engine that ends

The supervisor reads no request and loads no library: it has nothing that could crash. It runs one loop,
which never waits for a child. The module is run in place of the command, so the process keeps its id.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

from inferpool.engine.admin_relay import AdminRelay
from inferpool.engine.arena import ARENA_PARTS, make_arena
from inferpool.engine.catalog_merge import CatalogStore, EngineFacts
from inferpool.engine.catalog_parcel import pack, unpack
from inferpool.engine.child_loop import ChildLoop, reap
from inferpool.engine.control import Message
from inferpool.engine.device_engines import device_engines, is_device, own_engine
from inferpool.engine.grpc_keeper import GrpcKeeper
from inferpool.engine.liveness import Liveness
from inferpool.engine.restart_policy import Decision, RestartPolicy, Version
from inferpool.engine.spare_engine import LEAST_SPARE_BYTES, SpareEngine
from inferpool.engine.spawn import Child, name_process, spawn
from inferpool.engine.supervised import Crash, SupervisedEngine, SupervisedWeb
from inferpool.engine.supervisor_metrics import SupervisorMetrics
from inferpool.observe.logs import configure_logs, report_stopped
from inferpool.pool.token_buckets import MEMORY_BYTES
from inferpool.system.connection_counts import make_counts, set_absent
from inferpool.system.listeners import address_of, listen_internally, remove_socket_file, socket_file
from inferpool.system.memory import chosen_limit

log = logging.getLogger("inferpool.engine.supervisor")

WEB_MODULE: Final = "inferpool.web_process"
ENGINE_MODULE: Final = "inferpool.engine_process"
WEB_OOM_SCORE: Final = 250
ENGINE_OOM_SCORE: Final = 500
"""If memory runs out, the kernel ends engines first, whose requests run again in the next one; then web
processes, and the supervisor last."""
REPORT_S: Final = 0.5
"""How long web processes may take to tell what an engine ran when it died."""
WEB_STARTS: Final = 3
"""How often the first web process may die before it listens, until the server gives up."""
FIRST_PAUSE_S: Final = 0.5
MOST_PAUSE_S: Final = 30.0
RETRY_S: Final = 1.0
"""Pause before the next try if the system has no process, memory or descriptor to give."""
EARLY_S: Final = 5.0
"""A web process that dies so soon after its start pauses before the next start."""
CLOSE_S: Final = 10.0
"""How long web processes may take to close their connections after the drain timeout."""
PUBLISH_S: Final = 1.0
LEAST_ARENA_BYTES: Final = 64 * 2**20
PAGE_BYTES: Final = 4096
END_S: Final = 2.0
"""How long an engine may take to end after its own drain timeout."""


class Supervisor:
    """The loop. `run` returns the exit status."""

    def __init__(self, listener: socket.socket, repository: str, settings: Mapping[str, Any]) -> None:
        self._listener = listener
        self._repository = repository
        # Whether the bytes that requests may hold follow from the memory there is.
        self._derive = settings["derive"]
        self._settings = {
            name: value for name, value in settings.items() if name not in ("derive", "engine_devices")
        }
        self._clock = time.monotonic
        self._loop = ChildLoop(self._clock)
        self._policy = RestartPolicy(self._clock)
        self._liveness = Liveness(settings["silence_timeout_s"], 2 * PUBLISH_S)
        self._store = CatalogStore()
        self._webs = {number: SupervisedWeb(number) for number in range(1, settings["web_processes"] + 1)}
        self._engines: dict[str, SupervisedEngine] = {
            name: SupervisedEngine(name, device, number)
            for name, device, number in device_engines(
                settings["engine_devices"], settings["engines_per_device"]
            )
        }
        self._admin = AdminRelay(self._store, self._engines, self._answer_admin, self._allow)
        self._decisions: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
        """The labels and the traffic that engines were told last."""
        self._crashes: dict[str, Crash] = {}
        self._memory_bytes = chosen_limit(settings["memory_bytes"]).limit
        self._spare = SpareEngine(self._loop, spawn_engine)
        self._catalog_number = 0
        self._announced = False
        self._failed_starts = 0
        self._counts = make_counts(len(self._webs))
        self._rates = memory_file("inferpool-rates", MEMORY_BYTES)
        self._metrics = SupervisorMetrics(len(self._webs))
        self._info: dict[str, str] = {}
        self._arena_bytes = arena_bytes(settings["in_flight_bytes"])
        self._to_report = 0
        self._reported = False
        self._health: Mapping[str, Any] | None = None
        """What the web process said of the server that was the last to take a catalog."""
        self._unseen: list[tuple[SupervisedEngine, int, int]] = []
        """The engines that wait until all web processes have seen the catalog of a number."""
        self._draining = False
        self._drain_ends = 0.0
        self._draining_engines = False
        self._status: int | None = None
        self._exit_status = 0
        # All web processes take connections of the process that serves gRPC.
        self._forwarded: socket.socket | None = None
        self._grpc: GrpcKeeper | None = None
        if settings["grpc_port"] is not None:
            self._forwarded = listen_internally()
            self._metrics.expect_grpc()
            self._grpc = GrpcKeeper(
                self._loop,
                self._clock,
                self._settings,
                self._forwarded.getsockname().decode(),
                lambda: self._metrics.count("grpc_restarts_total"),
                self._refuse,
                {"slot": self._metrics.grpc_slot},
                [self._metrics.file],
            )

    def run(self) -> int:
        """Serve until a signal ends the server; the status is 0 if every accepted request was answered."""
        self._loop.watch_signals(self._answer_signal)
        self._publish()
        for web in self._webs.values():
            self._start_web(web)
        self._start_engines()
        if self._grpc is not None:
            self._grpc.start()
        while self._status is None:
            self._loop.turn(self._children())
        for child in self._children():
            child.kill()
            child.process.wait()
        return self._status

    # Web processes.

    def _start_web(self, web: SupervisedWeb) -> None:
        if self._draining or web.child is not None:
            return
        self._set_absent(web)
        try:
            web.child = child = spawn(WEB_MODULE, WEB_OOM_SCORE)
        except OSError as error:
            log.error("web process %d cannot be started: %s", web.number, error)
            self._loop.after(RETRY_S, lambda: self._start_web(web))
            return
        web.started, web.listens, web.seen = self._clock(), False, 0
        forwarded = [] if self._forwarded is None else [self._forwarded.fileno()]
        child.control.send(
            "start",
            {
                "web": web.number,
                "webs": len(self._webs),
                "settings": self._settings,
                "derive": self._derive,
                "info": self._info,
                "slot": web.number,
            },
            [self._listener.fileno(), self._counts, self._metrics.file, self._rates, *forwarded],
            wait=False,
        )
        self._loop.watch(child, lambda message: self._hear_web(web, message), lambda: self._web_ended(web))
        self._send_catalog(web)
        for engine in self._engines.values():
            self._connect(web, engine)

    def _set_absent(self, web: SupervisedWeb) -> None:
        """Let no other web process leave connections to this one."""
        set_absent(self._counts, web.number - 1, len(self._webs))

    def _hear_web(self, web: SupervisedWeb, message: Message) -> None:
        values = message.values
        if message.kind == "listening":
            web.listens = True
            web.pause_s = 0.0
            if not self._announced:
                self._announced = True
                tls = self._settings["tls_certificate_file"] is not None
                log.info("listening on %s", address_of(self._listener, tls=tls))
        elif message.kind == "seen":
            web.seen = values["catalog"]
            self._health = values
            self._report_loaded()
            self._report_seen()
        elif message.kind == "admin":
            self._admin.ask(web.number, values, draining=self._draining)
        elif message.kind == "crashed":
            crash = self._crashes.get(values["engine"])
            if crash is not None and web.number in crash.reports:
                crash.running.update((model, number) for model, number in values["versions"])
                crash.confirmed.update((model, number) for model, number in values["confirmed"])
                self._crash_reported(values["engine"], web.number)
        elif message.kind == "broken":
            self._end_broken(values["engine"], values["epoch"])
        elif message.kind == "refused":
            self._refuse(values["reason"])
        elif message.kind == "drained":
            self._exit_status = max(self._exit_status, values["status"])

    def _web_ended(self, web: SupervisedWeb) -> None:
        assert web.child is not None
        how = reap(web.child)
        status = web.child.process.returncode
        lived_s = self._clock() - web.started
        web.child = None
        self._set_absent(web)
        self._store.forget_web(str(web.number))
        self._report_seen()
        for descriptor in web.arenas.values():
            os.close(descriptor)
        web.arenas.clear()
        for engine in self._engines.values():
            if web.number in engine.connected and engine.child is not None:
                engine.child.control.send("disconnect", {"web": web.number}, wait=False)
            engine.connected.discard(web.number)
        self._admin.web_ended(web.number)
        for name in list(self._crashes):
            self._crash_reported(name, web.number)
        if self._draining:
            if status != 0:
                self._exit_status = 1
                if status != 1:
                    log.error("web process %d %s while it drained", web.number, how)
            if not any(other.child for other in self._webs.values()):
                self._drain_engines()
            return
        self._metrics.count("web_restarts_total")
        log.error("web process %d %s; its clients lost their connections", web.number, how)
        if not web.listens and not self._announced:
            self._failed_starts += 1
            if self._failed_starts >= WEB_STARTS:
                self._status = 1
                return
        if lived_s < EARLY_S:
            web.pause_s = min(MOST_PAUSE_S, 2 * web.pause_s or FIRST_PAUSE_S)
            self._loop.after(web.pause_s, lambda: self._start_web(web))
        else:
            self._start_web(web)

    # Engines.

    def _start_engines(self) -> None:
        """Start the engines of devices, but for those that measurements of an earlier one would disturb."""
        loaded = {engine.device for engine in self._engines.values() if engine.number == 1 and engine.loaded}
        for engine in list(self._engines.values()):
            if engine.parent is None and not engine.epoch and (engine.number == 1 or engine.device in loaded):
                self._start_engine(engine)

    def _need_devices(self, devices: Iterable[str]) -> None:
        """Start engines for devices that versions run on, and that the settings do not name."""
        missing = [
            device for device in devices
            if is_device(device) and all(engine.device != device for engine in self._engines.values())
        ]  # fmt: skip
        for name, device, number in device_engines(missing, self._settings["engines_per_device"]):
            self._engines[name] = SupervisedEngine(name, device, number)
        if missing:
            log.info("engines for %s start: versions run there", ", ".join(missing))
            self._start_engines()

    def _start_engine(self, engine: SupervisedEngine) -> None:
        """Start the process; `_tell_engine` says what it is to load."""
        if self._engines.get(engine.name) is not engine or engine.child is not None or self._draining_engines:
            return
        self._metrics.expect_restarts(engine.name)
        try:
            engine.child = child = self._spare.take() or spawn_engine()
        except OSError as error:
            log.error("engine %s cannot be started: %s", engine.name, error)
            self._loop.after(RETRY_S, lambda: self._start_engine(engine))
            return
        engine.pid = child.pid
        engine.epoch += 1
        engine.started, engine.told, engine.loaded, engine.answers = self._clock(), False, False, False
        self._loop.watch(
            child, lambda message: self._hear_engine(engine, message), lambda: self._engine_ended(engine)
        )
        self._set_facts(engine)
        if engine.name not in self._crashes:
            self._tell_engine(engine)
        if engine.epoch == 1:
            for web in self._webs.values():
                self._connect(web, engine)

    def _tell_engine(self, engine: SupervisedEngine) -> None:
        if engine.child is None or engine.told:
            return
        engine.told = True
        store = self._store
        # In memory, because a message has no room for the names of thousands of versions.
        kept = pack(
            {
                "plans": dict(store.plans),
                "moves": dict(store.moves),
                "traffic": dict(store.traffic),
                "held": store.held,
                "only": self._versions_for(engine),
                "skip": sorted(engine.skip),
                "device": engine.device,
                "takes_new": engine.parent is None,
                "share": self._settings["engines_per_device"] if engine.parent is None else 1,
            },
            {},
        )
        engine.child.control.send(
            "start",
            {
                "engine": engine.name,
                "epoch": engine.epoch,
                "repository": self._repository,
                "settings": self._settings,
                "slot": self._metrics.slot(engine.name),
            },
            [self._metrics.file, kept],
            wait=False,
        )
        os.close(kept)
        if engine.rescan_due:
            engine.child.control.send("rescan", wait=False)

    def _versions_for(self, engine: SupervisedEngine) -> list[Version] | None:
        """What an engine is to load; a successor takes no versions that were added to the folder since."""
        if engine.only is not None or engine.epoch == 1:
            return engine.only
        there = self._store.versions_for(engine.name)
        return [version for version in there if version not in engine.skip]

    def _publish(self) -> None:
        """Publish the gauges of the supervisor, and end silent processes, again and again."""
        now = self._clock()
        self._metrics.publish(now, (arena for web in self._webs.values() for arena in web.arenas.values()))
        self._end_silent(now)
        self._loop.after(PUBLISH_S, self._publish)

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

    def _connect(self, web: SupervisedWeb, engine: SupervisedEngine) -> None:
        """Give a web process and an engine a socket to each other, and their shared memory.

        An engine that takes over versions that have been ready is connected once they are ready again. Until
        then requests wait for it.
        """
        try:
            self._try_to_connect(web, engine)
        except OSError as error:
            log.error("web process %d and engine %s cannot be connected: %s", web.number, engine.name, error)
            self._loop.after(RETRY_S, lambda: self._connect(web, engine))

    def _try_to_connect(self, web: SupervisedWeb, engine: SupervisedEngine) -> None:
        if (
            web.child is None
            or self._draining_engines
            or web.number in engine.connected
            or self._engines.get(engine.name) is not engine
        ):
            return
        takes_over = engine.epoch > 1 or engine.parent is not None
        if engine.child is None or (takes_over and not engine.answers):
            arena = self._arena(web, engine)
            web.child.control.send("expect", {"engine": engine.name}, [arena], wait=False)
            return
        arena = self._arena(web, engine)
        web_end, engine_end = socket.socketpair()
        with web_end, engine_end:
            for end in (web_end, engine_end):
                end.setblocking(False)
            facts = {"web": web.number, "engine": engine.name, "epoch": engine.epoch}
            engine.child.control.send("connect", facts, [engine_end.fileno(), arena], wait=False)
            web.child.control.send("engine", {**facts, "up": True}, [web_end.fileno(), arena], wait=False)
        engine.connected.add(web.number)

    def _arena(self, web: SupervisedWeb, engine: SupervisedEngine) -> int:
        """The descriptor of the memory that a web process shares with an engine and its successors."""
        arena = web.arenas.get(engine.name)
        if arena is None:
            arena = web.arenas[engine.name] = make_arena(self._arena_bytes)
        return arena

    def _hear_engine(self, engine: SupervisedEngine, message: Message) -> None:
        values = message.values
        if message.kind == "loading":
            version = (values["model"], values["version"])
            began = engine.loading[version] = self._clock()
            if limit_s := self._settings["load_timeout_s"]:
                epoch = engine.epoch
                self._loop.after(limit_s, lambda: self._load_timed_out(engine, epoch, version, began))
        elif message.kind == "hello":
            self._info = values["info"]
            for web in self._webs.values():
                if web.child is not None:
                    web.child.control.send("info", {"info": self._info}, wait=False)
        elif message.kind == "models":
            self._take_catalog(engine, message.descriptors[0])
        elif message.kind == "loaded":
            engine.loaded = True
            self._answer_again(engine)
            self._start_engines()
            if self._memory_bytes >= LEAST_SPARE_BYTES:
                self._spare.plan(values["backends"])
            if engine.epoch == 1 or not self._reported:
                self._to_report = self._catalog_number
                self._report_loaded()
        elif message.kind == "answer":
            self._admin.take_answer(engine.name, values)
        elif message.kind == "await_seen":
            self._unseen.append((engine, engine.epoch, self._catalog_number))
            self._report_seen()
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
        for name, model in parcel.catalog["models"].items():
            for number, view in model["versions"].items():
                version = (name, int(number))
                if view["state"] == "ready":
                    self._policy.loaded(engine.name, version)
        loads = {(name, number) for name, number in parcel.catalog["loads"]}
        for version in [version for version in engine.loading if version not in loads]:
            del engine.loading[version]
        self._catalog_changed()
        self._answer_again(engine)
        self._tell_decisions(engine)
        self._need_devices(parcel.catalog["devices"])
        self._admin.take_jobs(engine.name, parcel.catalog["jobs"])
        if engine.parent is not None and all(
            view["state"] == "unloaded"
            for model in parcel.catalog["models"].values()
            for view in model["versions"].values()
        ):
            log.info("engine %s ends: its version is unloaded", engine.name)
            self._remove_engine(engine)

    # The admin side.

    def _allow(self, model: str, version: int | None) -> None:
        """Let engines load what has failed or crashed before, because an administrator asks for it."""
        for engine in self._engines.values():
            for every in (engine.skip, engine.skip_later):
                every -= {
                    key for key in every
                    if key[0] == model and version in (None, key[1]) and not self._own(key, engine.name)
                }  # fmt: skip
        self._store.allow(model, version)
        self._catalog_changed()

    def _own(self, version: Version, parent: str) -> SupervisedEngine | None:
        """The engine that has taken a version from `parent`."""
        return next(
            (engine for engine in self._engines.values()
             if engine.parent == parent and version in (engine.only or ())),
            None,
        )  # fmt: skip

    def _answer_admin(self, web: int, answer: Mapping[str, Any]) -> None:
        child = self._webs[web].child
        if child is not None:
            child.control.send("answer", answer, wait=False)

    def _tell_decisions(self, told_by: SupervisedEngine) -> None:
        """Tell all engines of labels and traffic that one has decided about: any may have to, later."""
        decisions = (dict(self._store.moves), dict(self._store.traffic))
        if decisions == self._decisions:
            return
        self._decisions = decisions
        others = [engine for engine in self._engines.values() if engine is not told_by and engine.told]
        for engine in others:
            if engine.child is not None:
                kept = pack({"moves": decisions[0], "traffic": decisions[1]}, {})
                try:
                    engine.child.control.send("decisions", {}, [kept], wait=False)
                finally:
                    os.close(kept)

    def _report_seen(self) -> None:
        """Tell the engines that wait for it that all web processes have seen their catalogs."""
        least = min((web.seen for web in self._webs.values() if web.child is not None), default=math.inf)
        for waiting in [waiting for waiting in self._unseen if waiting[2] <= least]:
            self._unseen.remove(waiting)
            engine, epoch, _ = waiting
            if engine.child is not None and engine.epoch == epoch:
                engine.child.control.send("seen", wait=False)

    def _answer_again(self, engine: SupervisedEngine) -> None:
        """Let web processes send requests to a successor once it is as ready as its predecessor was."""
        if engine.answers or engine.child is None or not (engine.loaded or self._is_restored(engine)):
            return
        if engine.epoch > 1:
            log.info("engine %s answers again after %.2f s", engine.name, self._clock() - engine.started)
        engine.answers = True
        for web in self._webs.values():
            self._connect(web, engine)

    def _is_restored(self, engine: SupervisedEngine) -> bool:
        """Whether no version that was ready before still loads in `engine`."""
        mine = [
            view for model in self._store.catalog["models"].values() for view in model["versions"].values()
            if engine.name in (view["engine"], *view["engines"])
        ]  # fmt: skip
        return bool(mine) and not any(engine.name in view["absent"] for view in mine)

    def _load_timed_out(self, engine: SupervisedEngine, epoch: int, version: Version, began: float) -> None:
        if engine.epoch != epoch or engine.loading.get(version) != began or engine.child is None:
            return
        reason = f"loading took longer than --load-timeout-s ({self._settings['load_timeout_s']:g} s)"
        log.error("%s/%d has failed: %s", *version, reason)
        del engine.loading[version]
        self._fail(engine, version, reason)
        if engine.parent is not None:
            self._remove_engine(engine)
        else:
            engine.skip.add(version)
            engine.blameless = True
            engine.child.kill()

    def _end_broken(self, name: str, epoch: int) -> None:
        """End an engine whose records a web process cannot read; mostly it has ended by itself."""
        engine = self._engines.get(name)
        if engine is not None and engine.epoch == epoch and engine.child is not None:
            engine.child.kill()

    def _fail(self, engine: SupervisedEngine, version: Version, reason: str) -> None:
        """Show a version as failed in an engine, and in the one that the engine has it from."""
        self._store.fail(version, reason, *filter(None, (engine.name, engine.parent)))
        self._catalog_changed()

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
        self._admin.engine_ended(engine.name)
        if self._engines.get(engine.name) is not engine:
            self._forget_engine(engine)
            return
        lived_s = self._clock() - engine.started
        log.error("engine %s (process %d) %s; a new one starts", engine.name, engine.pid, how)
        self._metrics.count("engine_restarts_total", engine.name)
        self._set_facts(engine)
        crash = Crash(how, lived_s, set(engine.loading), set(engine.connected))
        crash.running |= engine.hung
        crash.confirmed |= engine.hung
        engine.hung.clear()
        engine.loading.clear()
        engine.skip |= engine.skip_later
        for version in engine.skip_later:
            self._store.move(version, engine.name, self._own_name(version, engine))
        engine.skip_later.clear()
        engine.loaded = engine.answers = False
        webs = [self._webs[number] for number in engine.connected]
        self._tell_down(engine, webs, blame=not engine.blameless)
        engine.blameless = False
        self._crashes[engine.name] = crash
        self._catalog_changed()
        if set(engine.only or ()) & set(self._store.versions("unloaded")):
            log.info("engine %s is not replaced: its version was being unloaded", engine.name)
            self._remove_engine(engine)
            return
        if crash.reports:
            epoch = engine.epoch
            self._loop.after(REPORT_S, lambda: self._judge(engine, epoch))
            if lived_s >= EARLY_S:
                self._start_engine(engine)  # it imports its libraries meanwhile
        else:
            self._judge(engine, engine.epoch)

    def _tell_down(
        self, engine: SupervisedEngine, webs: Iterable[SupervisedWeb], *, blame: bool, gone: bool = False
    ) -> None:
        """Tell web processes that an engine has ended; it is reaped, so it writes to no arena any more."""
        facts = {"engine": engine.name, "epoch": engine.epoch, "up": False, "blame": blame, "gone": gone}
        for web in webs:
            if web.child is not None:
                web.child.control.send("engine", facts, wait=False)
        engine.connected.clear()

    def _crash_reported(self, name: str, web: int) -> None:
        crash = self._crashes.get(name)
        if crash is None or web not in crash.reports:
            return
        crash.reports.discard(web)
        if not crash.reports:
            self._judge(self._engines[name], self._engines[name].epoch)

    def _judge(self, engine: SupervisedEngine, epoch: int) -> None:
        """Decide what follows from a crash, now that web processes have told what they know."""
        crash = self._crashes.get(engine.name)
        if (
            crash is None
            or self._engines.get(engine.name) is not engine
            or epoch not in (engine.epoch, engine.epoch - 1)
        ):
            return
        del self._crashes[engine.name]
        decision = self._policy.died(
            engine.name,
            crash.how,
            crash.lived_s,
            own=engine.only[0] if engine.only is not None else None,
            running=crash.running,
            confirmed=crash.confirmed,
            loading=crash.loading,
        )
        self._apply(engine, crash, decision)

    def _apply(self, engine: SupervisedEngine, crash: Crash, decision: Decision) -> None:
        for version, reason in decision.fail.items():
            log.error("%s/%d has failed: %s", *version, reason)
            self._fail(engine, version, reason)
        if engine.parent is not None and decision.fail:
            self._remove_engine(engine)
            return
        for version in decision.isolate:
            name = self._own_name(version, engine)
            if name not in self._engines:
                log.error("%s/%d gets an engine of its own", *version)
                # The next process still answers the requests that wait for a version that it can load.
                if version in crash.loading:
                    engine.skip.add(version)
                    self._store.move(version, engine.name, name)
                else:
                    engine.skip_later.add(version)
                self._engines[name] = own = SupervisedEngine(name, engine.device)
                own.only, own.parent = [version], engine.name
                self._start_engine(own)
        if decision.pause_s:
            self._loop.after(decision.pause_s, lambda: self._go_on(engine))
        else:
            self._go_on(engine)

    def _own_name(self, version: Version, engine: SupervisedEngine) -> str:
        return own_engine(version, engine.name, first=engine.name == next(iter(self._engines)))

    def _go_on(self, engine: SupervisedEngine) -> None:
        """Let the process that replaces an engine load; it may have been started before the decision."""
        if engine.child is not None:
            self._tell_engine(engine)
        else:
            self._start_engine(engine)

    def _remove_engine(self, engine: SupervisedEngine) -> None:
        """End an engine for good."""
        self._engines.pop(engine.name, None)
        self._crashes.pop(engine.name, None)
        self._store.remove_engine(engine.name)
        self._catalog_changed()
        if engine.child is not None:
            engine.child.kill()  # the rest follows when it has ended
        else:
            self._forget_engine(engine)

    def _forget_engine(self, engine: SupervisedEngine) -> None:
        """Answer the requests that wait for an engine which has no successor, and free its memory."""
        self._tell_down(engine, self._webs.values(), blame=True, gone=True)
        self._metrics.free(engine.name)
        for web in self._webs.values():
            if (arena := web.arenas.pop(engine.name, None)) is not None:
                os.close(arena)

    def _set_facts(self, engine: SupervisedEngine) -> None:
        pid = 0 if engine.child is None else engine.child.pid
        self._store.set_engine(
            engine.name, EngineFacts(pid, max(0, engine.epoch - 1), engine.child is not None, engine.parent)
        )

    # The catalog.

    def _catalog_changed(self) -> None:
        self._catalog_number += 1
        for web in self._webs.values():
            self._send_catalog(web)

    def _send_catalog(self, web: SupervisedWeb) -> None:
        if web.child is None:
            return
        news = self._store.news_for(str(web.number))
        if news is None:
            web.seen = max(web.seen, self._catalog_number) if not self._store.catalog["models"] else web.seen
            news = (self._store.catalog, {})
        descriptor = pack(*news)
        try:
            web.child.control.send("models", {"catalog": self._catalog_number}, [descriptor], wait=False)
        finally:
            os.close(descriptor)

    def _report_loaded(self) -> None:
        """Log what is served once all web processes serve it, so that the line is true for each client."""
        health = self._health
        if not self._to_report or health is None:
            return
        if any(engine.parent is None and engine.epoch <= 1 and not engine.loaded
               for engine in self._engines.values()):  # fmt: skip
            return
        if all(web.child is None or web.seen >= self._to_report for web in self._webs.values()):
            self._to_report = 0
            self._reported = True
            for name, problem in health["problems"].items():
                log.warning("%s: %s", name, problem)
            log.info("%s: %d models", health["status"], health["models"])

    # The end.

    def _answer_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            log.info("SIGHUP: looking at the models folder again; changed settings need a restart")
            for engine in self._engines.values():
                engine.rescan_due = True  # until the engine says that it has looked; it may end before
                if engine.child is not None and engine.told:
                    engine.child.control.send("rescan", wait=False)
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
        for web in self._webs.values():
            if web.child is not None:
                web.child.control.send("drain", wait=False)
        if settle_s:
            self._loop.after(settle_s, lambda: log.info("the settle time is over: new requests are refused"))
        if self._grpc is not None:
            self._grpc.drain(settle_s, timeout_s, self._end_if_drained)
        if any(web.child for web in self._webs.values()):
            self._loop.after(settle_s + timeout_s + CLOSE_S, self._end_webs)
        else:
            self._drain_engines()

    def _end_webs(self) -> None:
        for web in self._webs.values():
            if web.child is not None:
                log.error("web process %d did not end in time", web.number)
                web.child.kill()

    def _drain_engines(self) -> None:
        """End the engines: every accepted request has its response, or never gets one."""
        if self._draining_engines:
            return
        self._draining_engines = True
        # Even without time left, idle instance threads need a moment to end.
        timeout_s = max(1.0, self._drain_ends - self._clock())
        running = [engine for engine in self._engines.values() if engine.child is not None]
        self._end_if_drained()
        for engine in running:
            assert engine.child is not None
            if engine.told:
                engine.child.control.send("drain", {"timeout_s": timeout_s}, wait=False)
            else:
                engine.child.kill()
        self._loop.after(timeout_s + END_S, self._end_engines)

    def _end_if_drained(self) -> None:
        """End the server once the engines and the process of gRPC have ended, in a drain."""
        waited_for = [engine.child for engine in self._engines.values()]
        if self._grpc is not None:
            waited_for.append(self._grpc.child)
        if self._draining_engines and not any(waited_for):
            self._status = self._exit_status

    def _end_engines(self) -> None:
        for engine in self._engines.values():
            if engine.child is not None:
                engine.child.kill()

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


def spawn_engine() -> Child:
    """Start an engine that is not told yet what to load."""
    return spawn(ENGINE_MODULE, ENGINE_OOM_SCORE)


def arena_bytes(in_flight_bytes: int) -> int:
    """Size of the memory that a web process and an engine share.

    There is room for inputs in flight, for outputs, and for bodies that are announced and received slowly.
    Only pages that are used take memory, so there is room for what cannot be used because of gaps.
    """
    return max(LEAST_ARENA_BYTES, ARENA_PARTS * in_flight_bytes) // PAGE_BYTES * PAGE_BYTES


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
