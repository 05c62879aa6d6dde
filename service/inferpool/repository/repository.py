"""The models folder at work: loads its versions and publishes those that are ready.

`Repository` puts the parts together, starts and ends them. `FolderContents` knows the folder,
`WantedVersions` knows what is to be served, and `LoadManager` decides when a version is loaded and drained.
`LoadedVersions` has the pools, and `PublishedViews` has what readers see. `AdminJobs` and `RoutingDecisions`
do what administrators ask for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from inferpool.errors import ConfigError, Reason
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Outbox, VersionKey
from inferpool.repository import health
from inferpool.repository.admin_jobs import AdminJobs
from inferpool.repository.catalog import Health, LiveView, ModelView
from inferpool.repository.catalog_readings import catalog_readings
from inferpool.repository.codec_factory import CodecSource
from inferpool.repository.folder_contents import FolderContents
from inferpool.repository.idle_measuring import IdleWatch
from inferpool.repository.jobs import Job
from inferpool.repository.load.loader import LoadedVersion, Loader
from inferpool.repository.load_manager import LoadManager
from inferpool.repository.loaded_versions import LoadedVersions
from inferpool.repository.measured_loads import MeasuredLoads
from inferpool.repository.published_views import PublishedViews
from inferpool.repository.routing_decisions import RoutingDecisions, moves_from_json
from inferpool.repository.traffic import traffic_from_json
from inferpool.repository.version_filter import VersionFilter
from inferpool.repository.version_source import HeldSource, VersionSource
from inferpool.repository.wanted_versions import WantedVersions
from inferpool.repository.watch import FolderWatch, Origin
from inferpool.settings import Settings
from inferpool.system.cpu import usable_cores
from inferpool.system.gpus import Driver, cuda_driver

log = logging.getLogger(__name__)

MOST_LOADS: Final = 4
"""How many versions load at once while a server starts."""
MOUNT_POLL_S: Final = 0.2
"""Pause between two looks for models that are not there yet."""


class Repository:
    """Loads the models of a folder into pools. The web side reads it as its `Catalog`.

    Attributes:
        router: takes requests to the pools.
        watch: has the folder looked at again.
        admin_jobs: begins and cancels loads and unloads.
        routing: decides which version answers.
        idle: has versions measured again when the machine is idle.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        outbox: Outbox,
        metrics: Metrics,
        clock: Callable[[], float],
        driver: Driver | None = None,
        *,
        remeasure: bool = False,
        only: Collection[VersionKey] | None = None,
        skip: Collection[VersionKey] = (),
        on_loading: Callable[[VersionKey], None] | None = None,
        on_change: Callable[[], None] | None = None,
        plans: Mapping[str, str] | None = None,
        on_hung: Callable[[VersionKey, Reason], None] | None = None,
        takes_new: bool = True,
        held: Mapping[VersionKey, HeldSource] | None = None,
        until_seen: Callable[[], None] | None = None,
        moves: Mapping[str, Mapping[str, tuple[int | None, int | None]]] | None = None,
        origin: Origin | None = None,
        traffic: Mapping[str, Mapping[str, Any] | None] | None = None,
        device: str | None = None,
    ) -> None:
        """Look for models in `path`; raises ConfigError if there are none.

        With the setting `repository_wait_s` it is `start` that waits for them instead.

        Args:
            driver: the GPU driver; None is this machine's.
            remeasure: whether to ignore kept measurements.
            only: the versions to serve; None for all. Other versions are not shown, and one that is not found
                has failed.
            skip: versions that are neither served nor shown.
            on_loading: called when a version begins to load in this process, in a thread. With it, the caller
                sees to it that no load takes longer than the setting `load_timeout_s`.
            on_change: called after every change of what `models` or `plans` returns, in a thread.
            plans: the plans of an earlier engine with the same versions.
            on_hung: called when a run does not stop, with the version and a sentence, in a thread. It is
                expected to end the process; if it is None, the version goes on as well as it can.
            held: what an earlier engine has loaded versions from. A version whose files have changed since
                has failed, until it is loaded again or the folder is looked at again.
            takes_new: whether versions beside `only` are served if they appear in the folder later.
            until_seen: waits until all that send requests know what `models` returns now; None if they look
                at it before each request.
            moves: the labels that were moved in an earlier engine, as `moves` returned them.
            origin: the store that the files come from; None if the folder is the user's.
            traffic: how requests were shared out in an earlier engine, as `traffic` returned that.
            device: the only device on which instances are made; None for all. Versions without any there are
                not shown.
        """
        self._settings = settings
        self._clock = clock
        self._draining = False
        versions = VersionFilter(only, skip)
        self._contents = FolderContents(
            path,
            versions,
            model_name=settings.model_name,
            wait_s=settings.repository_wait_s,
            held=held or {},
            moves={name: moves_from_json(labels) for name, labels in (moves or {}).items()},
        )
        shares = {name: traffic_from_json(sent) for name, sent in (traffic or {}).items()}
        self._views = PublishedViews(self._contents.declared, shares, on_change, until_seen)
        self.idle = IdleWatch(clock, self._work, self._measure_again)
        self._loader = Loader(
            settings,
            outbox,
            metrics,
            clock,
            driver,
            remeasure=remeasure,
            plans=plans,
            on_drop=on_change or (lambda: None),
            on_hung=on_hung,
            device=device,
        )
        self._loaded = LoadedVersions(
            MeasuredLoads(self._loader, settings, clock, device),
            self._views,
            self.idle,
            metrics,
            memory_bytes=settings.memory_bytes,
            drain_timeout_s=settings.drain_timeout_s,
            on_loading=on_loading,
            until_seen=until_seen,
            keeps_codec_sources=on_change is not None,
        )
        self.router = self._loaded.router
        # If a load can end the process, the supervisor must know which one did. GPUs capture graphs, which no
        # other load may disturb.
        alone = on_loading is not None or bool((driver or cuda_driver()).gpus())
        self._manager = LoadManager(
            self._loaded,
            self._views,
            clock,
            time.time,
            settings.load_timeout_s if on_loading is None else None,
            loads_at_once=1 if alone else min(MOST_LOADS, settings.threads or usable_cores()),
            first=settings.required_models,
        )
        self._wanted = WantedVersions(
            self._contents, versions, self._views, self._manager, settings.keep_warm_s
        )
        self.admin_jobs = AdminJobs(self._contents, self._views, self._wanted, self._manager, settings)
        self.routing = RoutingDecisions(self._contents, self._views, self._wanted, shares, metrics)
        for name, declared in self._contents.declared.items():
            sources = {
                number: self._contents.source(declared, number)
                for number in declared.served or [1]
                if versions.takes(VersionKey(name, number))
            }
            self._views.begin(name, sources)
        for name in self._views.models:
            self._wanted.tell(name)
        self._contents.forget_held()
        if takes_new:
            versions.take_new()
        self.watch = FolderWatch(path, lambda settled: self._wanted.rescan(settled=settled), origin)
        metrics.add_source(partial(catalog_readings, self), published=False)

    # The catalog.

    def models(self) -> Mapping[str, ModelView]:
        """Every model by name, as it is at this moment; the mapping does not change."""
        return self._views.models

    def live(self, key: VersionKey) -> LiveView:
        """The facts about a version that change; empty if it is not loaded."""
        lifecycle = self._manager.lifecycle(key)
        phase = None if lifecycle is None else lifecycle.phase
        live = self._loaded.live(key, phase)
        if live is not None:
            return live
        began = self._manager.loading().get(key)
        return LiveView(loading_s=0.0 if began is None else self._clock() - began, phase=phase)

    def health(self) -> Health:
        """Whether every required model can answer, and the problems there are."""
        required = self._settings.required_models
        return health.judge(self._views.models, self.live, required, draining=self._draining)

    async def refresh(self) -> None:
        """Do nothing: `live` and `health` are always up to date."""

    def devices_elsewhere(self) -> list[str]:
        """The devices of the versions that this process does not load, because it has another device."""
        elsewhere = list(self._views.elsewhere.values())
        return sorted({device for devices in elsewhere for device in devices})

    def plans(self) -> Mapping[str, str]:
        """The measured plans of the versions, by which another process can load them without measuring."""
        return self._loader.plans()

    def backends(self) -> list[str]:
        """The names of the backends that have loaded versions."""
        return self._loader.backends()

    def held(self) -> Mapping[VersionKey, VersionSource]:
        """What the versions that serve were loaded from, for the engine that comes after this one."""
        return self._loaded.sources()

    def codec_sources(self) -> Mapping[VersionKey, CodecSource]:
        """What the codecs of the versions that are loaded were made from; empty without `on_change`."""
        return self._loaded.codec_sources()

    def loaded(self, key: VersionKey) -> LoadedVersion:
        """The version that was loaded under `key`, with its pool and its models; raises KeyError."""
        return self._loaded.get(key)

    def jobs(self) -> list[Job]:
        """All jobs that run, and the last ones that have ended, oldest first."""
        return self._manager.jobs()

    def loading(self) -> list[VersionKey]:
        """The versions that load at this moment."""
        return list(self._manager.loading())

    def removed(self) -> list[VersionKey]:
        """The versions that were shown once, and are no longer."""
        return self._views.removed()

    def await_seen(self) -> None:
        """Wait until all that send requests know what is published now."""
        self._views.await_seen()

    # The life of the repository.

    def start(
        self, on_loaded: Callable[[], None], on_missing: Callable[[Reason], None] | None = None
    ) -> None:
        """Begin to load in a thread, which calls `on_loaded` when every version is ready or failed.

        If a load takes too long, the thread also calls `on_loaded` when all the others have ended. After
        later changes it calls `on_loaded` again. If there are no models yet, another thread waits for them,
        and calls `on_missing` with a sentence if none come in time.
        """
        if not self._contents.declared and on_missing is not None:
            arguments = (on_loaded, on_missing)
            threading.Thread(target=self._await_models, args=arguments, name="mount", daemon=True).start()
        else:
            self._begin(on_loaded)

    def _await_models(self, on_loaded: Callable[[], None], on_missing: Callable[[Reason], None]) -> None:
        """Begin to load when there are models; a mount may come after the server."""
        deadline = self._clock() + self._settings.repository_wait_s
        while not self._draining:
            try:
                self._contents.look()
            except (ConfigError, OSError) as error:
                if self._clock() >= deadline:
                    on_missing(f"no models for {self._settings.repository_wait_s:g} s: {error}")
                    return
                time.sleep(MOUNT_POLL_S)
            else:
                self._wanted.rescan()
                self._begin(on_loaded)
                return

    def _begin(self, on_loaded: Callable[[], None]) -> None:
        self._manager.start(partial(self._settled, on_loaded))
        if self._settings.watch:
            self.watch.start()

    def _settled(self, then: Callable[[], None]) -> None:
        if not self._wanted.tell_all():
            self._views.was_ready = True
            then()

    def load_now(self) -> None:
        """Load everything before returning."""
        ended = threading.Event()
        self.start(lambda: None if self._manager.loading() else ended.set())
        ended.wait()

    @property
    def is_loading(self) -> bool:
        """Whether a thread loads a version at this moment."""
        return self._manager.is_loading

    @property
    def is_busy(self) -> bool:
        """Whether a thread loads a version, or an instance's thread lives."""
        return self.is_loading or self._loaded.is_running

    def begin_drain(self) -> None:
        """Report that the server is not ready; requests that were accepted still run."""
        self._draining = True
        self.idle.stop()

    def drain(self, timeout_s: float) -> bool:
        """Finish the accepted requests and end every instance; False if `timeout_s` is too short."""
        self.begin_drain()
        self.watch.close()
        self.admin_jobs.close()
        self._manager.stop()
        return self._loaded.drain(self._clock() + timeout_s, self._clock)

    def close(self) -> None:
        """Free the memory of every model. The instances have ended."""
        self._loaded.close()

    # What is measured again.

    def _work(self) -> object:
        """Differs from its last value if there was anything to do meanwhile."""
        return (self._loaded.runs(), self._manager.loading(), self._manager.is_loading)

    def _measure_again(self, key: VersionKey) -> None:
        """Load a version again that was measured on a busy machine, if there is room beside it."""
        source = self._loaded.sources().get(key)
        if source is not None and self._loaded.fits_beside(source, ()):
            log.info("%s/%d is measured again, as the machine is idle", *key)
            self._loaded.remeasure(key)
            self._manager.load_again(key)
