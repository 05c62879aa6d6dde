"""Sends the merged catalog to web processes, and tells engines what is decided and seen."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

from inferpool.engine.catalog_parcel import pack
from inferpool.engine.catalog_store import CatalogStore
from inferpool.engine.supervised import SupervisedEngine, SupervisedWeb

log = logging.getLogger(__name__)


class CatalogDistribution:
    """Numbers each catalog, and knows which one every web process serves by."""

    def __init__(
        self,
        store: CatalogStore,
        webs: Mapping[int, SupervisedWeb],
        engines: Mapping[str, SupervisedEngine],
    ) -> None:
        """Send nothing yet. `webs` and `engines` are those of the server at each moment."""
        self._store = store
        self._webs = webs
        self._engines = engines
        self._number = 0
        self._decisions: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
        """The labels and the traffic that engines were told last."""
        self._unseen: list[tuple[SupervisedEngine, int, int]] = []
        """The engines that wait until all web processes have seen the catalog of a number."""
        self._to_report = 0
        self._reported = False
        self._health: Mapping[str, Any] | None = None
        """The state of the server, as told by the web process that took a catalog last."""

    def changed(self) -> None:
        """Send what has changed in the store to all web processes."""
        self._number += 1
        for web in self._webs.values():
            self.send(web)

    def send(self, web: SupervisedWeb) -> None:
        """Send a web process what it does not have."""
        if web.child is None:
            return
        news = self._store.news_for(str(web.number))
        if news is None:
            web.seen = max(web.seen, self._number) if not self._store.catalog["models"] else web.seen
            news = (self._store.catalog, {})
        descriptor = pack(*news)
        try:
            web.child.control.send("models", {"catalog": self._number}, [descriptor], wait=False)
        finally:
            os.close(descriptor)

    def seen(self, web: SupervisedWeb, values: Mapping[str, Any]) -> None:
        """Take note that a web process serves by a catalog, and of what it says of the server's health."""
        web.seen = values["catalog"]
        self._health = values
        self._report_loaded()
        self._report_seen()

    def web_ended(self, web: SupervisedWeb) -> None:
        """Take note that the successor of a web process has no catalog."""
        self._store.forget_web(str(web.number))
        self._report_seen()

    def await_seen(self, engine: SupervisedEngine) -> None:
        """Tell an engine once all web processes have seen the catalog that there is now."""
        self._unseen.append((engine, engine.epoch, self._number))
        self._report_seen()

    def loaded(self, engine: SupervisedEngine) -> None:
        """Log what is served, soon, if an engine has loaded for the first time."""
        if engine.epoch == 1 or not self._reported:
            self._to_report = self._number
            self._report_loaded()

    def tell_decisions(self, told_by: SupervisedEngine) -> None:
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
