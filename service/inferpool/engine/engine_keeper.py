"""Keeps the engines: starts them, tells them what to load, and ends them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from inferpool.engine.catalog_distribution import CatalogDistribution
from inferpool.engine.catalog_merge import EngineFacts
from inferpool.engine.catalog_parcel import pack
from inferpool.engine.catalog_store import CatalogStore
from inferpool.engine.child_loop import ChildLoop
from inferpool.engine.control import Message
from inferpool.engine.device_engines import device_engines, is_device
from inferpool.engine.process_connections import ProcessConnections
from inferpool.engine.restart_policy import Version
from inferpool.engine.spare_engine import SpareEngine
from inferpool.engine.spawn import Child, spawn
from inferpool.engine.supervised import SupervisedEngine
from inferpool.engine.supervisor_metrics import SupervisorMetrics

log = logging.getLogger(__name__)

MODULE: Final = "inferpool.engine_process"
OOM_SCORE: Final = 500
"""More than that of web processes: the requests of an engine run again in the next one."""
RETRY_S: Final = 1.0
"""Pause before the next try if the system has no process, memory or descriptor to give."""


class EngineKeeper:
    """Keeps the processes of `engines`, which it adds to and removes from."""

    def __init__(
        self,
        loop: ChildLoop,
        clock: Callable[[], float],
        engines: dict[str, SupervisedEngine],
        store: CatalogStore,
        catalog: CatalogDistribution,
        connections: ProcessConnections,
        spare: SpareEngine,
        metrics: SupervisorMetrics,
        repository: str,
        settings: Mapping[str, Any],
        *,
        hear: Callable[[SupervisedEngine, Message], None],
        ended: Callable[[SupervisedEngine], None],
    ) -> None:
        """Start nothing yet.

        Args:
            repository: the folder or store that the models come from.
            hear: called with each message of an engine.
            ended: called when the process of an engine has ended, which has yet to be reaped.
        """
        self._loop = loop
        self._clock = clock
        self._engines = engines
        self._store = store
        self._catalog = catalog
        self._connections = connections
        self._spare = spare
        self._metrics = metrics
        self._repository = repository
        self._settings = settings
        self._hear = hear
        self._ended = ended
        self._drains = False

    # The start.

    def start_due(self) -> None:
        """Start the engines of devices, but for those that measurements of an earlier one would disturb."""
        loaded = {engine.device for engine in self._engines.values() if engine.number == 1 and engine.loaded}
        for engine in list(self._engines.values()):
            if engine.parent is None and not engine.epoch and (engine.number == 1 or engine.device in loaded):
                self.start(engine)

    def need_devices(self, devices: Iterable[str]) -> None:
        """Start engines for devices that versions run on, and that the settings do not name."""
        missing = [
            device for device in devices
            if is_device(device) and all(engine.device != device for engine in self._engines.values())
        ]  # fmt: skip
        for name, device, number in device_engines(missing, self._settings["engines_per_device"]):
            self._engines[name] = SupervisedEngine(name, device, number)
        if missing:
            log.info("engines for %s start: versions run there", ", ".join(missing))
            self.start_due()

    def start_own(self, name: str, version: Version, parent: SupervisedEngine) -> None:
        """Start an engine that takes one version from `parent`."""
        self._engines[name] = own = SupervisedEngine(name, parent.device)
        own.only, own.parent = [version], parent.name
        self.start(own)

    def start(self, engine: SupervisedEngine) -> None:
        """Start the process; `tell` says what it is to load."""
        if self._engines.get(engine.name) is not engine or engine.child is not None or self._drains:
            return
        self._metrics.expect_restarts(engine.name)
        try:
            engine.child = child = self._spare.take() or spawn_engine()
        except OSError as error:
            log.error("engine %s cannot be started: %s", engine.name, error)
            self._loop.after(RETRY_S, lambda: self.start(engine))
            return
        engine.pid = child.pid
        engine.epoch += 1
        engine.started, engine.told, engine.loaded, engine.answers = self._clock(), False, False, False
        self._loop.watch(child, lambda message: self._hear(engine, message), lambda: self._ended(engine))
        self.set_facts(engine)
        if engine.crash is None:
            self.tell(engine)
        if engine.epoch == 1:
            self._connections.connect_engine(engine)

    def tell(self, engine: SupervisedEngine) -> None:
        """Tell an engine what it is to load, unless it knows."""
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
        """Return the versions that an engine is to load; None stands for all.

        A successor takes no versions that were added to the folder since its first predecessor.
        """
        if engine.only is not None or engine.epoch == 1:
            return engine.only
        there = self._store.versions_for(engine.name)
        return [version for version in there if version not in engine.skip]

    def go_on(self, engine: SupervisedEngine) -> None:
        """Let the process that replaces an engine load; it may have been started already."""
        if engine.child is not None:
            self.tell(engine)
        else:
            self.start(engine)

    # While it runs.

    def answer_again(self, engine: SupervisedEngine) -> None:
        """Let web processes send requests to a successor once it is as ready as its predecessor was."""
        if engine.answers or engine.child is None or not (engine.loaded or self._is_restored(engine)):
            return
        if engine.epoch > 1:
            log.info("engine %s answers again after %.2f s", engine.name, self._clock() - engine.started)
        engine.answers = True
        self._connections.connect_engine(engine)

    def _is_restored(self, engine: SupervisedEngine) -> bool:
        """Whether no version that was ready before still loads in `engine`."""
        mine = [
            view for model in self._store.catalog["models"].values() for view in model["versions"].values()
            if engine.name in (view["engine"], *view["engines"])
        ]  # fmt: skip
        return bool(mine) and not any(engine.name in view["absent"] for view in mine)

    def allow(self, model: str, version: int | None) -> None:
        """Let engines load what has failed or crashed before, because an administrator asks for it."""
        for engine in self._engines.values():
            for every in (engine.skip, engine.skip_later):
                every -= {
                    key for key in every
                    if key[0] == model and version in (None, key[1]) and not self._has_own(key, engine.name)
                }  # fmt: skip
        self._store.allow(model, version)
        self._catalog.changed()

    def _has_own(self, version: Version, parent: str) -> bool:
        """Whether an engine has taken a version from `parent`."""
        return any(
            engine.parent == parent and version in (engine.only or ()) for engine in self._engines.values()
        )

    def rescan(self) -> None:
        """Let all engines look at the models folder again."""
        for engine in self._engines.values():
            engine.rescan_due = True  # until the engine says that it has looked; it may end before
            if engine.child is not None and engine.told:
                engine.child.control.send("rescan", wait=False)

    def end_broken(self, name: str, epoch: int) -> None:
        """End an engine whose records a web process cannot read; mostly it has ended by itself."""
        engine = self._engines.get(name)
        if engine is not None and engine.epoch == epoch and engine.child is not None:
            engine.child.kill()

    def set_facts(self, engine: SupervisedEngine) -> None:
        """Let the catalog say whether an engine runs, and in which process."""
        pid = 0 if engine.child is None else engine.child.pid
        self._store.set_engine(
            engine.name, EngineFacts(pid, max(0, engine.epoch - 1), engine.child is not None, engine.parent)
        )

    # The end.

    def remove(self, engine: SupervisedEngine) -> None:
        """End an engine for good."""
        self._engines.pop(engine.name, None)
        engine.crash = None
        self._store.remove_engine(engine.name)
        self._catalog.changed()
        if engine.child is not None:
            engine.child.kill()  # the rest follows when it has ended
        else:
            self.forget(engine)

    def forget(self, engine: SupervisedEngine) -> None:
        """Free what was kept for the successor of an engine that has none."""
        self._connections.forget_engine(engine)
        self._metrics.free(engine.name)

    def drain(self, timeout_s: float) -> None:
        """Let the engines answer what they have accepted, and end."""
        self._drains = True
        for engine in self._engines.values():
            if engine.child is None:
                continue
            if engine.told:
                engine.child.control.send("drain", {"timeout_s": timeout_s}, wait=False)
            else:
                engine.child.kill()

    def kill_all(self) -> None:
        """End those that did not end by themselves in a drain."""
        for engine in self._engines.values():
            if engine.child is not None:
                engine.child.kill()


def spawn_engine() -> Child:
    """Start an engine that is not told yet what to load."""
    return spawn(MODULE, OOM_SCORE)
