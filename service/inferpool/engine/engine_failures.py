"""Deals with engines that die, and with loads that do not end.

Web processes report what the engine ran. `RestartPolicy` decides with that which versions have failed, which
get engines of their own, and when a successor goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from inferpool.engine.catalog_distribution import CatalogDistribution
from inferpool.engine.catalog_store import CatalogStore
from inferpool.engine.child_loop import ChildLoop
from inferpool.engine.device_engines import own_engine
from inferpool.engine.engine_keeper import EngineKeeper
from inferpool.engine.process_connections import ProcessConnections
from inferpool.engine.restart_policy import Decision, RestartPolicy, Version
from inferpool.engine.supervised import Crash, SupervisedEngine
from inferpool.engine.supervisor_metrics import SupervisorMetrics

log = logging.getLogger(__name__)

REPORT_S: Final = 0.5
"""How long web processes may take to tell what an engine ran when it died."""
EARLY_S: Final = 5.0
"""The successor of an engine that lived longer starts before it is known what follows from the crash."""


class EngineFailures:
    """The crashes of engines that are not decided about, and the loads that may take too long."""

    def __init__(
        self,
        loop: ChildLoop,
        clock: Callable[[], float],
        engines: Mapping[str, SupervisedEngine],
        store: CatalogStore,
        catalog: CatalogDistribution,
        connections: ProcessConnections,
        keeper: EngineKeeper,
        metrics: SupervisorMetrics,
        load_timeout_s: float,
    ) -> None:
        """`engines` are those of the server at each moment; with 0, a load may take any time."""
        self._loop = loop
        self._clock = clock
        self._engines = engines
        self._store = store
        self._catalog = catalog
        self._connections = connections
        self._keeper = keeper
        self._metrics = metrics
        self._load_timeout_s = load_timeout_s
        self._policy = RestartPolicy(clock)

    # Loads.

    def load_begun(self, engine: SupervisedEngine, version: Version) -> None:
        """Take note that a version loads, which must end in time."""
        began = engine.loading[version] = self._clock()
        if self._load_timeout_s:
            epoch = engine.epoch
            self._loop.after(
                self._load_timeout_s, lambda: self._load_timed_out(engine, epoch, version, began)
            )

    def take_catalog(self, engine: SupervisedEngine, catalog: Mapping[str, Any]) -> None:
        """Take note of the versions that an engine has loaded, and of those that it loads no more."""
        for name, model in catalog["models"].items():
            for number, view in model["versions"].items():
                version = (name, int(number))
                if view["state"] == "ready":
                    self._policy.loaded(engine.name, version)
        loads = {(name, number) for name, number in catalog["loads"]}
        for version in [version for version in engine.loading if version not in loads]:
            del engine.loading[version]

    def _load_timed_out(self, engine: SupervisedEngine, epoch: int, version: Version, began: float) -> None:
        if engine.epoch != epoch or engine.loading.get(version) != began or engine.child is None:
            return
        reason = f"loading took longer than --load-timeout-s ({self._load_timeout_s:g} s)"
        log.error("%s/%d has failed: %s", *version, reason)
        del engine.loading[version]
        self._fail(engine, version, reason)
        if engine.parent is not None:
            self._keeper.remove(engine)
        else:
            engine.skip.add(version)
            engine.blameless = True
            engine.child.kill()

    def _fail(self, engine: SupervisedEngine, version: Version, reason: str) -> None:
        """Show a version as failed in an engine, and in the one that the engine has it from."""
        self._store.fail(version, reason, *filter(None, (engine.name, engine.parent)))
        self._catalog.changed()

    # Crashes.

    def ended(self, engine: SupervisedEngine, how: str) -> None:
        """Take note that an engine has died; `how` is the end of a sentence."""
        lived_s = self._clock() - engine.started
        log.error("engine %s (process %d) %s; a new one starts", engine.name, engine.pid, how)
        self._metrics.count("engine_restarts_total", engine.name)
        self._keeper.set_facts(engine)
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
        self._connections.engine_ended(engine, blame=not engine.blameless)
        engine.blameless = False
        engine.crash = crash
        self._catalog.changed()
        if set(engine.only or ()) & set(self._store.versions("unloaded")):
            log.info("engine %s is not replaced: its version was being unloaded", engine.name)
            self._keeper.remove(engine)
            return
        if crash.reports:
            epoch = engine.epoch
            self._loop.after(REPORT_S, lambda: self._judge(engine, epoch))
            if lived_s >= EARLY_S:
                self._keeper.start(engine)  # it imports its libraries meanwhile
        else:
            self._judge(engine, engine.epoch)

    def reported(self, web: int, values: Mapping[str, Any]) -> None:
        """Take what a web process tells of the requests that an engine ran when it died."""
        engine = self._engines.get(values["engine"])
        crash = None if engine is None else engine.crash
        if engine is not None and crash is not None and web in crash.reports:
            crash.running.update((model, number) for model, number in values["versions"])
            crash.confirmed.update((model, number) for model, number in values["confirmed"])
            self._take_report(engine, web)

    def web_ended(self, web: int) -> None:
        """Wait for no report of a web process any more."""
        for engine in list(self._engines.values()):
            self._take_report(engine, web)

    def _take_report(self, engine: SupervisedEngine, web: int) -> None:
        crash = engine.crash
        if crash is None or web not in crash.reports:
            return
        crash.reports.discard(web)
        if not crash.reports:
            self._judge(engine, engine.epoch)

    def _judge(self, engine: SupervisedEngine, epoch: int) -> None:
        """Decide what follows from a crash, now that web processes have told what they know."""
        crash = engine.crash
        if (
            crash is None
            or self._engines.get(engine.name) is not engine
            or epoch not in (engine.epoch, engine.epoch - 1)
        ):
            return
        engine.crash = None
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
            self._keeper.remove(engine)
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
                self._keeper.start_own(name, version, engine)
        if decision.pause_s:
            self._loop.after(decision.pause_s, lambda: self._keeper.go_on(engine))
        else:
            self._keeper.go_on(engine)

    def _own_name(self, version: Version, engine: SupervisedEngine) -> str:
        return own_engine(version, engine.name, first=engine.name == next(iter(self._engines)))
