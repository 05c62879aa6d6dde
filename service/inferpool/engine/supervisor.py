"""The parent of all other processes: it listens, answers signals, and starts again what dies.

    supervisor ─┬─ web process 1 … N     read requests, write answers
                ├─ engine 1 … M          hold models, and run them
                └─ a spare engine        takes the place of the next engine that ends

The supervisor reads no request and loads no library: it has nothing that could crash. It runs one loop,
which never waits for a child. The module is run in place of the command, so the process keeps its id.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import math
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from inferpool.engine.arena import make_arena
from inferpool.engine.catalog_merge import CatalogStore, EngineFacts
from inferpool.engine.catalog_parcel import pack, unpack
from inferpool.engine.control import Message
from inferpool.engine.liveness import Liveness
from inferpool.engine.restart_policy import SHARED, Decision, RestartPolicy, Version, own_engine
from inferpool.engine.spawn import SUPERVISED, Child, name_process, spawn
from inferpool.observe.families import CPU_SECONDS
from inferpool.observe.logs import configure_logs
from inferpool.observe.regions import Region, make_regions, read_beat
from inferpool.pool.token_buckets import MEMORY_BYTES
from inferpool.system.connection_counts import make_counts, set_absent
from inferpool.system.listeners import address_of, remove_socket_file, socket_file

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
EARLY_S: Final = 5.0
"""A web process that dies so soon after its start pauses before the next start."""
CLOSE_S: Final = 10.0
"""How long web processes may take to close their connections after the drain timeout."""
FLUSH_S: Final = 0.02
"""Pause until a message is sent again to a child whose socket is full."""
ENGINE_SLOTS: Final = 64
"""How many engines publish metrics of their own."""
PUBLISH_S: Final = 1.0
LEAST_ARENA_BYTES: Final = 256 * 2**20
PAGE_BYTES: Final = 4096
SPARE_S: Final = 1.0
"""Pause until there is another spare engine, so that its start takes no time from an engine that loads."""
LATE_SPARE_S: Final = 30.0
"""The same if the last spare engine has ended by itself."""
END_S: Final = 2.0
"""How long an engine may take to end after its own drain timeout."""


class _Web:
    """A web process, or the place of one that is being started again."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        self.started = 0.0
        self.pause_s = 0.0
        self.listens = False
        self.arenas: dict[str, int] = {}
        self.seen = 0
        """The number of the last catalog that the process serves by."""


class _Engine:
    """An engine, or the place of one that is being started again.

    Attributes:
        epoch: which process this is in the engine's life; a late answer of an earlier one is ignored.
        only: the versions that the engine takes; None for all but `skip`.
        skip_later: the versions that the process after the next one does not take either.
        loading: the versions that load, with the moment of the beginning.
        told: whether the process knows what it is to load.
        connected: the web processes that have a socket to it.
        loaded: whether every version is ready or has failed.
        blameless: whether the supervisor ends it because of a load, so that no request is to blame.
        answers: whether it has all the versions that its predecessor had.
        hung: the versions of which a run did not stop, for which the engine ends itself.
    """

    def __init__(self, name: str, only: list[Version] | None = None) -> None:
        self.name = name
        self.only = only
        self.skip: set[Version] = set()
        self.skip_later: set[Version] = set()
        self.child: Child | None = None
        self.pid = 0
        self.epoch = 0
        self.started = 0.0
        self.told = False
        self.connected: set[int] = set()
        self.loading: dict[Version, float] = {}
        self.loaded = False
        self.answers = False
        self.blameless = False
        self.hung: set[Version] = set()


class _Crash:
    """What is known about the death of an engine, until all reports are in."""

    def __init__(self, how: str, lived_s: float, loading: set[Version], reports: set[int]) -> None:
        self.how = how
        self.lived_s = lived_s
        self.loading = loading
        self.reports = reports
        self.running: set[Version] = set()
        self.confirmed: set[Version] = set()


class Supervisor:
    """The loop. `run` returns the exit status."""

    def __init__(self, listener: socket.socket, repository: str, settings: Mapping[str, Any]) -> None:
        self._listener = listener
        self._repository = repository
        # Whether the bytes that requests may hold follow from the memory there is.
        self._derive = settings["derive"]
        self._settings = {name: value for name, value in settings.items() if name != "derive"}
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._clock = time.monotonic
        self._policy = RestartPolicy(self._clock)
        self._liveness = Liveness(settings["silence_timeout_s"], 2 * PUBLISH_S)
        self._store = CatalogStore()
        self._webs = {number: _Web(number) for number in range(1, settings["web_processes"] + 1)}
        self._engines: dict[str, _Engine] = {SHARED: _Engine(SHARED)}
        self._crashes: dict[str, _Crash] = {}
        self._spare: Child | None = None
        self._spare_is_due = False
        # The backends that engines have used, which a spare imports.
        self._backends: set[str] = set()
        self._catalog_number = 0
        self._announced = False
        self._failed_starts = 0
        self._counts = make_counts(len(self._webs))
        self._rates = memory_file("inferpool-rates", MEMORY_BYTES)
        slots = 1 + len(self._webs) + ENGINE_SLOTS
        self._metrics = make_regions(slots)
        self._region = Region(self._metrics, 0)
        # From the start: a rate misses the first event of a new series.
        self._region.numbers("web_restarts_total", (), 1)
        self._slots = {SHARED: 1 + len(self._webs)}
        self._info: dict[str, str] = {}
        self._arena_bytes = arena_bytes(settings["in_flight_bytes"])
        self._to_report = 0
        self._reported = False
        self._health: Mapping[str, Any] | None = None
        """What the web process said of the server that was the last to take a catalog."""
        self._unseen: list[tuple[_Engine, int, int]] = []
        """The engines that wait until all web processes have seen the catalog of a number."""
        self._signals: list[int] = []
        self._draining = False
        self._drain_ends = 0.0
        self._draining_engines = False
        self._status: int | None = None
        self._exit_status = 0

    def run(self) -> int:
        """Serve until a signal ends the server; the status is 0 if every accepted request was answered."""
        self._watch_signals()
        self._publish()
        for web in self._webs.values():
            self._start_web(web)
        for engine in list(self._engines.values()):
            self._start_engine(engine)
        while self._status is None:
            timeout = max(0.0, self._timers[0][0] - self._clock()) if self._timers else None
            # A child that reads nothing keeps its messages waiting; all others go on.
            waiting = [child for child in self._children() if not child.control.flush()]
            if waiting:
                timeout = FLUSH_S if timeout is None else min(timeout, FLUSH_S)
            for key, _ in self._selector.select(timeout):
                # An earlier callback may have closed the descriptor.
                if self._selector.get_map().get(key.fileobj) is key:
                    key.data()
            now = self._clock()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
        for child in self._children():
            child.kill()
            child.process.wait()
        return self._status

    # Web processes.

    def _start_web(self, web: _Web) -> None:
        if self._draining:
            return
        self._set_absent(web)
        web.child = child = spawn(WEB_MODULE, WEB_OOM_SCORE)
        web.started, web.listens, web.seen = self._clock(), False, 0
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
            [self._listener.fileno(), self._counts, self._metrics, self._rates],
            wait=False,
        )
        self._watch(child, lambda message: self._hear_web(web, message), lambda: self._web_ended(web))
        self._send_catalog(web)
        for engine in self._engines.values():
            self._connect(web, engine)

    def _set_absent(self, web: _Web) -> None:
        """Let no other web process leave connections to this one."""
        set_absent(self._counts, web.number - 1, len(self._webs))

    def _hear_web(self, web: _Web, message: Message) -> None:
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
            self._administer(web, values)
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

    def _web_ended(self, web: _Web) -> None:
        assert web.child is not None
        how = self._reap(web.child)
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
        self._count("web_restarts_total")
        log.error("web process %d %s; its clients lost their connections", web.number, how)
        if not web.listens and not self._announced:
            self._failed_starts += 1
            if self._failed_starts >= WEB_STARTS:
                self._status = 1
                return
        if lived_s < EARLY_S:
            web.pause_s = min(MOST_PAUSE_S, 2 * web.pause_s or FIRST_PAUSE_S)
            self._after(web.pause_s, lambda: self._start_web(web))
        else:
            self._start_web(web)

    # Engines.

    def _start_engine(self, engine: _Engine) -> None:
        """Start the process; `_tell_engine` says what it is to load."""
        if self._engines.get(engine.name) is not engine:
            return
        self._region.numbers("engine_restarts_total", (engine.name,), 1)
        engine.child = child = self._take_spare() or spawn(ENGINE_MODULE, ENGINE_OOM_SCORE)
        engine.pid = child.pid
        engine.epoch += 1
        engine.started, engine.told, engine.loaded, engine.answers = self._clock(), False, False, False
        self._watch(
            child, lambda message: self._hear_engine(engine, message), lambda: self._engine_ended(engine)
        )
        self._set_facts(engine)
        if engine.name not in self._crashes:
            self._tell_engine(engine)
        if engine.epoch == 1:
            for web in self._webs.values():
                self._connect(web, engine)

    def _plan_spare(self, pause_s: float) -> None:
        if self._spare is None and not self._spare_is_due:
            self._spare_is_due = True
            self._after(pause_s, self._start_spare)

    def _start_spare(self) -> None:
        """Start an engine that imports its libraries, and waits until it has to replace another one."""
        self._spare_is_due = False
        if self._draining:
            return
        self._spare = child = spawn(ENGINE_MODULE, ENGINE_OOM_SCORE)
        child.control.send("prepare", {"backends": sorted(self._backends)}, wait=False)
        self._watch(child, Message.close, self._spare_ended)

    def _take_spare(self) -> Child | None:
        child, self._spare = self._spare, None
        if child is not None:
            self._selector.unregister(child.control)
            self._selector.unregister(child.pidfd)
        return child

    def _spare_ended(self) -> None:
        assert self._spare is not None
        how = self._reap(self._spare)
        self._spare = None
        if not self._draining:
            log.error("the spare engine %s", how)
            self._plan_spare(LATE_SPARE_S)

    def _tell_engine(self, engine: _Engine) -> None:
        if engine.child is None or engine.told:
            return
        engine.told = True
        store = self._store
        kept = pack({"plans": dict(store.plans), "moves": dict(store.moves), "held": store.held}, {})
        engine.child.control.send(
            "start",
            {
                "engine": engine.name,
                "epoch": engine.epoch,
                "repository": self._repository,
                "settings": self._settings,
                "only": self._versions_for(engine),
                "skip": sorted(engine.skip),
                "slot": self._slot(engine.name),
            },
            [self._metrics, kept],
            wait=False,
        )
        os.close(kept)

    def _versions_for(self, engine: _Engine) -> list[Version] | None:
        """What an engine is to load; a successor takes no versions that were added to the folder since."""
        if engine.only is not None or engine.epoch == 1:
            return engine.only
        there = self._store.versions("ready", "loading", "failed")
        return [version for version in there if version not in engine.skip]

    def _slot(self, engine: str) -> int | None:
        """Where an engine and its successors publish their metrics; None if there are too many engines."""
        if engine not in self._slots and len(self._slots) < ENGINE_SLOTS:
            self._slots[engine] = 1 + len(self._webs) + len(self._slots)
        return self._slots.get(engine)

    def _count(self, name: str, *labels: str) -> None:
        """Add 1 to a counter of the supervisor."""
        numbers = self._region.numbers(name, labels, 1)
        if numbers is not None:
            numbers[0] += 1

    def _publish(self) -> None:
        """Publish the gauges of the supervisor, and end silent processes, again and again."""
        files = [self._metrics, *(arena for web in self._webs.values() for arena in web.arenas.values())]
        held = 512 * sum(os.fstat(file).st_blocks for file in files)
        for name, number in (("shared_memory_bytes", held), (CPU_SECONDS, time.process_time())):
            numbers = self._region.numbers(name, (), 1)
            if numbers is not None:
                numbers[0] = number
        now = self._clock()
        self._region.beat(now)
        self._end_silent(now)
        self._after(PUBLISH_S, self._publish)

    def _end_silent(self, now: float) -> None:
        """End processes that show no sign of life; what they had goes to their successors."""
        if self._draining:
            return  # the drain has a timeout of its own
        watched: dict[int, tuple[str, Child, float]] = {}
        for web in self._webs.values():
            if web.child is not None:
                beat = read_beat(self._metrics, web.number, web.child.pid)
                watched[web.child.pid] = (f"web process {web.number}", web.child, beat)
        for engine in self._engines.values():
            slot = self._slots.get(engine.name)
            if engine.child is not None and slot is not None and not engine.loading:
                beat = read_beat(self._metrics, slot, engine.pid)
                watched[engine.pid] = (f"engine {engine.name}", engine.child, beat)
        silent = self._liveness.look(now, {pid: beat for pid, (_, _, beat) in watched.items()})
        for pid, seconds in silent.items():
            what, child, _ = watched[pid]
            text = "%s (process %d) has shown no sign of life for %.1f s, and is ended"
            log.error(text, what, pid, seconds)
            child.kill()

    def _connect(self, web: _Web, engine: _Engine) -> None:
        """Give a web process and an engine a socket to each other, and their shared memory.

        An engine that takes over versions that have been ready is connected once they are ready again. Until
        then requests wait for it.
        """
        if web.child is None or self._draining_engines or web.number in engine.connected:
            return
        takes_over = engine.epoch > 1 or engine.name != SHARED
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

    def _arena(self, web: _Web, engine: _Engine) -> int:
        """The descriptor of the memory that a web process shares with an engine and its successors."""
        arena = web.arenas.get(engine.name)
        if arena is None:
            arena = web.arenas[engine.name] = make_arena(self._arena_bytes)
        return arena

    def _hear_engine(self, engine: _Engine, message: Message) -> None:
        values = message.values
        if message.kind == "loading":
            version = (values["model"], values["version"])
            began = engine.loading[version] = self._clock()
            if limit_s := self._settings["load_timeout_s"]:
                epoch = engine.epoch
                self._after(limit_s, lambda: self._load_timed_out(engine, epoch, version, began))
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
            self._backends.update(values["backends"])
            self._plan_spare(SPARE_S)
            if engine.epoch == 1 or not self._reported:
                self._to_report = self._catalog_number
                self._report_loaded()
        elif message.kind == "answer":
            child = self._webs[values["web"]].child
            if child is not None:
                child.control.send("answer", values, wait=False)
        elif message.kind == "await_seen":
            self._unseen.append((engine, engine.epoch, self._catalog_number))
            self._report_seen()
        elif message.kind == "refused":
            self._refuse(values["reason"])
        elif message.kind == "hung":
            log.error("engine %s ends: %s/%d: %s", engine.name, *values["version"], values["reason"])
            engine.hung.add((values["version"][0], values["version"][1]))
        elif message.kind == "drained" and not values["ok"]:
            log.error("a model was still running when the drain timeout ended")
            self._exit_status = 1

    def _take_catalog(self, engine: _Engine, descriptor: int) -> None:
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
                    self._policy.loaded(version)
        loads = {(name, number) for name, number in parcel.catalog["loads"]}
        for version in [version for version in engine.loading if version not in loads]:
            del engine.loading[version]
        self._catalog_changed()
        self._answer_again(engine)
        if engine.name != SHARED and all(
            view["state"] == "unloaded"
            for model in parcel.catalog["models"].values()
            for view in model["versions"].values()
        ):
            log.info("engine %s ends: its version is unloaded", engine.name)
            self._remove_engine(engine)

    # The admin side.

    def _administer(self, web: _Web, values: Mapping[str, Any]) -> None:
        """Pass what an administrator asks to the engine that has the model; the engine answers."""
        engine = self._engines.get(self._engine_for(values) or "")
        if engine is None or engine.child is None or not engine.told or self._draining:
            refusal = "the engine of the model is being started or ended; try again later"
            answer = {"id": values["id"], "error": refusal, "code": "not_ready"}
            if web.child is not None:
                web.child.control.send("answer", answer, wait=False)
            return
        if values["action"] == "load":
            model, version = values["model"], values["version"]
            for every in (engine.skip, engine.skip_later):
                every -= {key for key in every if key[0] == model and version in (None, key[1])}
            self._store.allow(model, version)
            self._catalog_changed()
        engine.child.control.send("admin", {**values, "web": web.number}, wait=False)

    def _engine_for(self, values: Mapping[str, Any]) -> str | None:
        """The name of the engine that is to do something, the shared one for a model that no engine has."""
        if values["action"] == "cancel":
            return self._store.engine_of_job(values["job"])
        version = values.get("version")
        if values["action"] in ("load", "unload") and version is not None:
            name = self._store.engine_of_version(values["model"], version) or SHARED
            return name if name in self._engines else SHARED
        return self._store.engine_of_model(values["model"]) or SHARED

    def _report_seen(self) -> None:
        """Tell the engines that wait for it that all web processes have seen their catalogs."""
        least = min((web.seen for web in self._webs.values() if web.child is not None), default=math.inf)
        for waiting in [waiting for waiting in self._unseen if waiting[2] <= least]:
            self._unseen.remove(waiting)
            engine, epoch, _ = waiting
            if engine.child is not None and engine.epoch == epoch:
                engine.child.control.send("seen", wait=False)

    def _answer_again(self, engine: _Engine) -> None:
        """Let web processes send requests to a successor once it is as ready as its predecessor was."""
        if engine.answers or engine.child is None or not (engine.loaded or self._is_restored(engine)):
            return
        if engine.epoch > 1:
            log.info("engine %s answers again after %.2f s", engine.name, self._clock() - engine.started)
        engine.answers = True
        for web in self._webs.values():
            self._connect(web, engine)

    def _is_restored(self, engine: _Engine) -> bool:
        """Whether no version that was ready before still loads in `engine`."""
        shown = False
        for model in self._store.catalog["models"].values():
            for view in model["versions"].values():
                if view["engine"] == engine.name:
                    shown = True
                    if view["reloading"]:
                        return False
        return shown

    def _load_timed_out(self, engine: _Engine, epoch: int, version: Version, began: float) -> None:
        if engine.epoch != epoch or engine.loading.get(version) != began or engine.child is None:
            return
        name = own_engine(version)
        reason = f"loading took longer than --load-timeout-s ({self._settings['load_timeout_s']:g} s)"
        log.error("%s has failed: %s", name, reason)
        del engine.loading[version]
        self._fail(version, reason)
        if engine.name == name:
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

    def _fail(self, version: Version, reason: str) -> None:
        self._store.fail(*version, reason)
        self._catalog_changed()

    def _engine_ended(self, engine: _Engine) -> None:
        assert engine.child is not None
        how = self._reap(engine.child)
        status = engine.child.process.returncode
        engine.child = None
        if self._draining_engines:
            if status != 0:
                log.error("engine %s %s while it drained", engine.name, how)
                self._exit_status = 1
            if not any(other.child for other in self._engines.values()):
                self._status = self._exit_status
            return
        if self._engines.get(engine.name) is not engine:
            self._forget_engine(engine)
            return
        lived_s = self._clock() - engine.started
        log.error("engine %s (process %d) %s; a new one starts", engine.name, engine.pid, how)
        self._count("engine_restarts_total", engine.name)
        self._set_facts(engine)
        crash = _Crash(how, lived_s, set(engine.loading), set(engine.connected))
        crash.running |= engine.hung
        crash.confirmed |= engine.hung
        engine.hung.clear()
        engine.loading.clear()
        engine.skip |= engine.skip_later
        for version in engine.skip_later:
            self._store.move(version, own_engine(version))
        engine.skip_later.clear()
        engine.loaded = engine.answers = False
        webs = [self._webs[number] for number in engine.connected]
        self._tell_down(engine, webs, blame=not engine.blameless)
        engine.blameless = False
        self._crashes[engine.name] = crash
        self._catalog_changed()
        if crash.reports:
            epoch = engine.epoch
            self._after(REPORT_S, lambda: self._judge(engine, epoch))
            if lived_s >= EARLY_S:
                self._start_engine(engine)  # it imports its libraries meanwhile
        else:
            self._judge(engine, engine.epoch)

    def _tell_down(self, engine: _Engine, webs: Iterable[_Web], *, blame: bool, gone: bool = False) -> None:
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

    def _judge(self, engine: _Engine, epoch: int) -> None:
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
            running=crash.running,
            confirmed=crash.confirmed,
            loading=crash.loading,
        )
        self._apply(engine, crash, decision)

    def _apply(self, engine: _Engine, crash: _Crash, decision: Decision) -> None:
        for version, reason in decision.fail.items():
            log.error("%s/%d has failed: %s", *version, reason)
            self._fail(version, reason)
        if engine.name != SHARED and decision.fail:
            self._remove_engine(engine)
            return
        for version in decision.isolate:
            name = own_engine(version)
            if name not in self._engines:
                log.error("%s/%d gets an engine of its own", *version)
                # The next process still answers the requests that wait for a version that it can load.
                if version in crash.loading:
                    engine.skip.add(version)
                    self._store.move(version, name)
                else:
                    engine.skip_later.add(version)
                self._engines[name] = own = _Engine(name, [version])
                self._start_engine(own)
        if decision.pause_s:
            self._after(decision.pause_s, lambda: self._go_on(engine))
        else:
            self._go_on(engine)

    def _go_on(self, engine: _Engine) -> None:
        """Let the process that replaces an engine load; it may have been started before the decision."""
        if engine.child is not None:
            self._tell_engine(engine)
        else:
            self._start_engine(engine)

    def _remove_engine(self, engine: _Engine) -> None:
        """End an engine for good."""
        self._engines.pop(engine.name, None)
        self._crashes.pop(engine.name, None)
        self._store.remove_engine(engine.name)
        self._catalog_changed()
        if engine.child is not None:
            engine.child.kill()  # the rest follows when it has ended
        else:
            self._forget_engine(engine)

    def _forget_engine(self, engine: _Engine) -> None:
        """Answer the requests that wait for an engine which has no successor, and free its memory."""
        self._tell_down(engine, self._webs.values(), blame=True, gone=True)
        for web in self._webs.values():
            if (arena := web.arenas.pop(engine.name, None)) is not None:
                os.close(arena)

    def _set_facts(self, engine: _Engine) -> None:
        pid = 0 if engine.child is None else engine.child.pid
        self._store.set_engine(
            engine.name, EngineFacts(pid, max(0, engine.epoch - 1), engine.child is not None)
        )

    # The catalog.

    def _catalog_changed(self) -> None:
        self._catalog_number += 1
        for web in self._webs.values():
            self._send_catalog(web)

    def _send_catalog(self, web: _Web) -> None:
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
        if all(web.child is None or web.seen >= self._to_report for web in self._webs.values()):
            self._to_report = 0
            self._reported = True
            for name, problem in health["problems"].items():
                log.warning("%s: %s", name, problem)
            log.info("%s: %d models", health["status"], health["models"])

    # The end.

    def _watch_signals(self) -> None:
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        for number in SUPERVISED:
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, lambda number, frame: self._signals.append(number))
        signal.set_wakeup_fd(writer.fileno())
        self._wakeup = (reader, writer)
        self._selector.register(reader, selectors.EVENT_READ, self._answer_signals)
        # Signals have waited since the server listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISED)

    def _answer_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup[0].recv(4096)
        while self._signals:
            number = signal.Signals(self._signals.pop(0))
            if number == signal.SIGHUP:
                log.info("SIGHUP: looking at the models folder again; changed settings need a restart")
                for engine in self._engines.values():
                    if engine.child is not None and engine.told:
                        engine.child.control.send("rescan", wait=False)
            elif self._draining:
                self._status = 1
            else:
                log.info("%s: draining", number.name)
                self._drain()

    def _drain(self) -> None:
        self._draining = True
        settle_s, timeout_s = self._settings["drain_settle_s"], self._settings["drain_timeout_s"]
        self._drain_ends = self._clock() + settle_s + timeout_s
        for web in self._webs.values():
            if web.child is not None:
                web.child.control.send("drain", wait=False)
        if settle_s:
            self._after(settle_s, lambda: log.info("the settle time is over: new requests are refused"))
        if any(web.child for web in self._webs.values()):
            self._after(settle_s + timeout_s + CLOSE_S, self._end_webs)
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
        if not running:
            self._status = self._exit_status
        for engine in running:
            assert engine.child is not None
            if engine.told:
                engine.child.control.send("drain", {"timeout_s": timeout_s}, wait=False)
            else:
                engine.child.kill()
        self._after(timeout_s + END_S, self._end_engines)

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

    # The loop.

    def _watch(self, child: Child, hear: Callable[[Message], None], ended: Callable[[], None]) -> None:
        def read() -> None:
            with contextlib.suppress(EOFError):
                while (message := child.control.receive()) is not None:
                    try:
                        hear(message)
                    except Exception:
                        # Nothing that a child says may end the server.
                        log.exception("a message of process %d: %s", child.pid, message.kind)
                    finally:
                        message.close()
                return
            self._selector.unregister(child.control)

        def end() -> None:
            with contextlib.suppress(KeyError):
                read()  # its last words
            for fileobj in (child.control, child.pidfd):
                with contextlib.suppress(KeyError):
                    self._selector.unregister(fileobj)
            ended()

        self._selector.register(child.control, selectors.EVENT_READ, read)
        self._selector.register(child.pidfd, selectors.EVENT_READ, end)

    def _reap(self, child: Child) -> str:
        """Wait for a process that has ended; returns how it did."""
        status = child.process.wait()
        child.close()
        if status >= 0:
            return f"ended with status {status}"
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"

    def _children(self) -> list[Child]:
        owners: list[_Web | _Engine] = [*self._webs.values(), *self._engines.values()]
        children = [owner.child for owner in owners if owner.child is not None]
        return children if self._spare is None else [*children, self._spare]

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._clock() + seconds, next(self._timer_ids), then))


def arena_bytes(in_flight_bytes: int) -> int:
    """Size of the memory that a web process and an engine share: room for inputs and outputs in flight.

    Only pages that are used take memory, so there is room for what cannot be used because of gaps.
    """
    return max(LEAST_ARENA_BYTES, 2 * in_flight_bytes) // PAGE_BYTES * PAGE_BYTES


def memory_file(name: str, nbytes: int) -> int:
    """The descriptor of new memory of `nbytes` bytes, which children map."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(file, nbytes)
    return file


def replace_process(listener: socket.socket, repository: Path, settings: Mapping[str, Any]) -> NoReturn:
    """Become the supervisor: what this process has imported so far is gone, its id stays."""
    plan = os.memfd_create("inferpool-settings", 0)
    os.write(plan, json.dumps({"repository": str(repository), "settings": settings}).encode())
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
    return status


if __name__ == "__main__":
    raise SystemExit(main())
