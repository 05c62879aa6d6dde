"""The models folder at work: loads its versions and publishes those that are ready.

`LoadManager` decides what is loaded and drained, and when. This module knows the folder, the pools and the
views. Each change is published as a new mapping, so that readers see a consistent state without a lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from inferpool.backends.registry import backends_by_suffix
from inferpool.errors import (
    ConfigError,
    Conflict,
    InferpoolError,
    ModelNotFound,
    Reason,
    RunsElsewhere,
    VersionNotFound,
)
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Outbox, VersionKey
from inferpool.pool.router import PoolRouter
from inferpool.repository import health
from inferpool.repository import lifecycle as lifecycle_rules
from inferpool.repository.catalog import (
    DRAINING,
    FAILED,
    LOADING,
    READY,
    UNLOADED,
    Health,
    LiveView,
    ModelView,
    VersionView,
)
from inferpool.repository.catalog_readings import catalog_readings
from inferpool.repository.codec_factory import CodecSource
from inferpool.repository.config import ModelConfig, check_label, read_config
from inferpool.repository.declared_model import (
    DeclaredModel,
    config_stamp,
    label_fault,
    none_served,
    served_versions,
)
from inferpool.repository.idle_measuring import LOOK_S, IdleMeasuring
from inferpool.repository.jobs import Job
from inferpool.repository.label_moves import LabelMove, apply_moves, keep_moves, read_moves
from inferpool.repository.layout import CONFIG_FILE, ModelFolder, name_single, scan
from inferpool.repository.lifecycle import Phase, VersionLifecycle
from inferpool.repository.load.loader import LoadedVersion, Loader
from inferpool.repository.load_manager import LoadManager, Outcome
from inferpool.repository.load_room import fits_beside
from inferpool.repository.settled_sources import SettledSources
from inferpool.repository.traffic import (
    ENDED,
    PROMOTED,
    ROLLED_BACK,
    CanaryState,
    Traffic,
    traffic_from_json,
)
from inferpool.repository.version_source import HeldSource, VersionSource, read_source
from inferpool.repository.watch import FolderWatch, Origin
from inferpool.settings import Settings
from inferpool.system.cpu import usable_cores
from inferpool.system.cpu_wait import waited_share
from inferpool.system.gpus import Driver, cuda_driver
from inferpool.system.memory import memory_use, release_freed_memory
from inferpool.system.priority import at_low_priority
from inferpool.tensors import names_text

if TYPE_CHECKING:
    from inferpool.repository.version_fetches import VersionFetches

log = logging.getLogger(__name__)


LATE_DRAIN_S: Final = 1.0
"""How long the instances of a version that has loaded too late may take to end."""
ON_THEIR_WAY_S: Final = 0.1
"""How long requests to a version may be on their way from another process that has sent its last one."""
MOST_LOADS: Final = 4
"""How many versions load at once while a server starts."""
MOUNT_POLL_S: Final = 0.2
"""Pause between two looks for models that are not there yet."""
MOST_DEFAULTS: Final = 10
"""How many earlier default versions of a model are remembered for a rollback."""
STABLE: Final = "stable"


class Repository:
    """Loads the models of a folder into pools. The web side reads it as its `Catalog`.

    Attributes:
        router: takes requests to the pools.
        watch: has the folder looked at again.
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
            on_loading: called when a version begins to load, in a thread. With it, the caller sees to it that
                no load takes longer than the setting `load_timeout_s`.
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
        self.router = PoolRouter()
        self._path = path
        self._settings = settings
        self._metrics = metrics
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
        # The devices of the versions that run on others only.
        self._elsewhere: dict[VersionKey, Sequence[str]] = {}
        self._clock = clock
        self._loaded: dict[VersionKey, LoadedVersion] = {}
        self._publishing = threading.RLock()
        self._scanning = threading.RLock()
        self._draining = False
        self._was_ready = False
        self._only = None if only is None else frozenset(only)
        self._skip = set(skip)
        self._takes_new = takes_new
        self._on_loading = on_loading
        self._on_change = on_change
        self._until_seen = until_seen
        self._codec_sources: dict[VersionKey, CodecSource] = {}
        # If a load can end the process, the supervisor must know which one did. GPUs capture graphs, which no
        # other load may disturb.
        alone = on_loading is not None or bool((driver or cuda_driver()).gpus())
        self._manager = LoadManager(
            self,
            clock,
            time.time,
            settings.load_timeout_s if on_loading is None else None,
            loads_at_once=1 if alone else min(MOST_LOADS, settings.threads or usable_cores()),
            first=settings.required_models,
        )
        self._fetches: VersionFetches | None = None
        self._idle_measuring = IdleMeasuring()
        self._watches_idleness = False
        self._remeasured: VersionKey | None = None
        self._told: set[Reason] = set()
        # The name in the folder of the model that the setting `model_name` names.
        self._own_name: str | None = None
        # Versions that somebody has unloaded, and those that somebody has loaded although model.toml serves
        # them not. Those to be forgotten have vanished from the folder, or newer ones serve in their place.
        self._unloaded: set[VersionKey] = set()
        self._asked_for: set[VersionKey] = set()
        self._forgotten: set[VersionKey] = set()
        self._removed: set[VersionKey] = set()
        self._defaults: dict[str, list[int]] = {}
        self._sources: dict[VersionKey, VersionSource | Reason] = {}
        self._held = dict(held or {})
        # What versions are loaded from at the moment, and what those that serve were loaded from.
        self._load_sources: dict[VersionKey, VersionSource] = {}
        self._served_sources: dict[VersionKey, VersionSource] = {}
        self._moves = {
            name: {label: LabelMove(*move) for label, move in labels.items()}
            for name, labels in (moves or {}).items()
        }
        self._traffic = {name: traffic_from_json(sent) for name, sent in (traffic or {}).items()}
        self._declared = {model.name: self._declare(model) for model in self._scan(path)}
        self._models: Mapping[str, ModelView] = MappingProxyType(
            {
                name: view
                for name, declared in self._declared.items()
                if (view := self._first_view(declared)).versions
            }
        )
        for name in self._models:
            self._tell_wanted(name)
        self._held = {}
        if takes_new:
            self._only = None
        self.watch = FolderWatch(path, lambda settled: self.rescan(settled=settled), origin)
        metrics.add_source(partial(catalog_readings, self), published=False)

    def _look(self, path: Path) -> list[ModelFolder]:
        """The models in `path`, by their names in requests; raises ConfigError if there are none."""
        name = self._settings.model_name
        models = name_single(scan(path, backends_by_suffix(), self._told), name, self._own_name)
        named = next((model for model in models if model.aliases), None)
        if named is not None:
            self._own_name = named.aliases[0]
        elif name is not None and all(model.name != name for model in models):
            self._tell(
                f"--model-name {name} is not used: it names a single model, and there are {len(models)}"
            )
        return models

    def _scan(self, path: Path) -> list[ModelFolder]:
        """The models in `path`, and those of `only` that are not there."""
        try:
            found = self._look(path)
        except ConfigError as error:
            if self._only is None:
                if not self._settings.repository_wait_s:
                    raise
                log.info("waiting up to %g s for models: %s", self._settings.repository_wait_s, error.detail)
            found = []
        by_name = {model.name: model for model in found}
        for key in sorted(self._only or ()):
            model = by_name.setdefault(key.model, ModelFolder(key.model, None, faults={key.version: ""}))
            versions = {*model.files, *model.faults}
            if versions and key.version not in model.files and not model.faults.get(key.version):
                model.faults[key.version] = f"{key.model}/{key.version} is no longer in {path}"
        return list(by_name.values())

    # The catalog.

    def models(self) -> Mapping[str, ModelView]:
        """Every model by name, as it is at this moment; the mapping does not change."""
        return self._models

    def live(self, key: VersionKey) -> LiveView:
        """The facts about a version that change; empty if it is not loaded."""
        loaded = self._loaded.get(key)
        if loaded is None:
            began = self._manager.loading().get(key)
            return LiveView(loading_s=0.0 if began is None else self._clock() - began, phase=self._phase(key))
        pool = loaded.pool
        rows, age_s, wait_s = pool.waiting()
        return LiveView(
            pool.instances(),
            pool.latency.table(),
            rows,
            age_s,
            wait_s,
            pool.batching_stopped,
            pool.batches(),
            pool.bucket_sizes(),
            loaded.copies.tensorrt,
            phase=self._phase(key),
        )

    def _phase(self, key: VersionKey) -> Phase | None:
        lifecycle = self._manager.lifecycle(key)
        return None if lifecycle is None else lifecycle.phase

    def health(self) -> Health:
        """Whether every required model can answer, and the problems there are."""
        return health.judge(self._models, self.live, self._settings.required_models, draining=self._draining)

    async def refresh(self) -> None:
        """Do nothing: `live` and `health` are always up to date."""

    def devices_elsewhere(self) -> list[str]:
        """The devices of the versions that this process does not load, because it has another device."""
        return sorted({device for devices in list(self._elsewhere.values()) for device in devices})

    def plans(self) -> Mapping[str, str]:
        """The measured plans of the versions, by which another process can load them without measuring."""
        return self._loader.plans()

    def backends(self) -> list[str]:
        """The names of the backends that have loaded versions."""
        return self._loader.backends()

    def held(self) -> Mapping[VersionKey, VersionSource]:
        """What the versions that serve were loaded from, for the engine that comes after this one."""
        return dict(self._served_sources)

    def codec_sources(self) -> Mapping[VersionKey, CodecSource]:
        """What the codecs of the versions that are loaded were made from; empty without `on_change`."""
        return dict(self._codec_sources)

    def loaded(self, key: VersionKey) -> LoadedVersion:
        """The version that was loaded under `key`, with its pool and its models; raises KeyError."""
        return self._loaded[key]

    def start(
        self, on_loaded: Callable[[], None], on_missing: Callable[[Reason], None] | None = None
    ) -> None:
        """Begin to load in a thread, which calls `on_loaded` when every version is ready or failed.

        If a load takes too long, the thread also calls `on_loaded` when all the others have ended. After
        later changes it calls `on_loaded` again. If there are no models yet, another thread waits for them,
        and calls `on_missing` with a sentence if none come in time.
        """
        if not self._declared and on_missing is not None:
            arguments = (on_loaded, on_missing)
            threading.Thread(target=self._await_models, args=arguments, name="mount", daemon=True).start()
        else:
            self._begin(on_loaded)

    def _await_models(self, on_loaded: Callable[[], None], on_missing: Callable[[Reason], None]) -> None:
        """Begin to load when there are models; a mount may come after the server."""
        deadline = self._clock() + self._settings.repository_wait_s
        while not self._draining:
            try:
                self._look(self._path)
            except (ConfigError, OSError) as error:
                if self._clock() >= deadline:
                    on_missing(f"no models for {self._settings.repository_wait_s:g} s: {error}")
                    return
                time.sleep(MOUNT_POLL_S)
            else:
                self.rescan()
                self._begin(on_loaded)
                return

    def _begin(self, on_loaded: Callable[[], None]) -> None:
        self._manager.start(partial(self._settled, on_loaded))
        if self._settings.watch:
            self.watch.start()

    def _settled(self, then: Callable[[], None]) -> None:
        with self._scanning:
            ended = [self._tell_wanted(name, look=False) for name in list(self._declared)]
        if not any(ended):
            self._was_ready = True
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
        return self.is_loading or any(pool.is_running for pool in self.router.pools())

    def begin_drain(self) -> None:
        """Report that the server is not ready; requests that were accepted still run."""
        self._draining = True

    def drain(self, timeout_s: float) -> bool:
        """Finish the accepted requests and end every instance; False if `timeout_s` is too short."""
        self.begin_drain()
        self.watch.close()
        if self._fetches is not None:
            self._fetches.close()
        self._manager.stop()
        deadline = self._clock() + timeout_s
        ended = [pool.drain(max(0.0, deadline - self._clock())) for pool in self.router.pools()]
        return all(ended)

    def close(self) -> None:
        """Free the memory of every model. The instances have ended."""
        for loaded in self._loaded.values():
            loaded.close()

    # What is to be served.

    def rescan(self, model: str | None = None, settled: SettledSources | None = None) -> bool:
        """Look at the folder again: new and changed versions are loaded, deleted ones drained.

        Only at one model if `model` names one. With `settled`, files that are still being copied wait; the
        result is then whether there are any.
        """
        with self._scanning:
            try:
                folders = self._look(self._path)
            except (ConfigError, OSError) as error:
                # A volume that is not mounted for a moment must not unload everything.
                self._tell(f"{self._path} is not looked at again, and what is loaded goes on: {error}")
                return False
            found = {folder.name: folder for folder in folders}
            for name in self._declared:
                found.setdefault(name, ModelFolder(name, None))
            waits = False
            for name, folder in found.items():
                if model not in (None, name):
                    continue
                known = self._declared.get(name)
                if (
                    known is not None
                    and settled is not None
                    and not settled.is_config_settled(name, config_stamp(folder), known.stamp)
                ):
                    waits = True
                    continue
                self._declared[name] = self._declare(folder, known)
                self._publish_model(name)
                waits = self._tell_wanted(name, settled) is None or waits
                if not self._declared[name].found and name not in self._models:
                    del self._declared[name]
            return waits

    def _tell(self, sentence: Reason) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            log.warning("%s", sentence)

    def _declare(self, model: ModelFolder, known: DeclaredModel | None = None) -> DeclaredModel:
        """What the folder says of a model now; `known` is what it said before."""
        fault: Reason | None = None
        config = ModelConfig()
        try:
            if model.folder is not None:
                config = read_config(model.folder / CONFIG_FILE)
        except InferpoolError as error:
            fault = error.detail
            if known is not None:
                config = known.config
                if fault != known.fault:
                    log.error("%s; what is loaded of %s goes on", fault, model.name)
        # Where the folder cannot be written, only this process knows its moves.
        moves = read_moves(model.folder) | self._moves.get(model.name, {})
        found = {*model.files, *model.faults}
        served = served_versions(config, found, apply_moves(config.versions.labels, moves))
        if self._only is not None:
            # A version that was served stays served, even if a newer one is there now.
            taken = {key.version for key in self._only if key.model == model.name}
            served = sorted({*served, *(taken & found)})
        return DeclaredModel(model, config, fault, served, moves, config_stamp(model))

    def _tell_wanted(
        self,
        name: str,
        settled: SettledSources | None = None,
        retry: Collection[int] = (),
        *,
        look: bool = True,
    ) -> bool | None:
        """Tell the manager what is to be served of a model; returns whether that ends a version.

        None if files are still being copied. Without `look`, files that have changed count as unchanged.
        """
        declared = self._declared[name]
        wanted = set(declared.served) | {key.version for key in self._asked_for if key.model == name}
        wanted &= declared.found
        absent = not wanted and not any(key.model == name for key in self._unloaded)
        waits = ends = False
        for version in sorted(wanted or ({1} if absent and declared.folder.origin else ()), reverse=True):
            key = VersionKey(name, version)
            if not self._takes(key) or key in self._unloaded:
                continue
            source = self._source(declared, version) if look else self._sources.get(key)
            if source is None:
                continue
            if settled is not None and not settled.is_settled(key, source):
                waits = True
                continue
            self._sources[key] = source
            self._forgotten.discard(key)
            if isinstance(source, VersionSource):
                self._manager.want(key, source, retry=version in retry)
            else:
                self._manager.fail(key, source, source)
            wanted.add(version)
        succeeded = any(self._succeeded(VersionKey(name, version)) for version in wanted)
        for key, lifecycle in self._manager.lifecycles():
            if key.model != name or (key.version in wanted and key not in self._unloaded):
                continue
            vanished = key.version not in declared.found
            if vanished and settled is not None and not settled.is_settled(key, None):
                waits = True
                continue
            if not vanished and key not in self._unloaded and not succeeded:
                continue  # the newer version has yet to load
            if key not in self._unloaded or vanished:
                self._forgotten.add(key)
                self._unloaded.discard(key)
                self._asked_for.discard(key)
            if lifecycle.wanted is not None:
                ends = True
                warm = not vanished and key not in self._unloaded
                self._manager.unwant(key, self._settings.keep_warm_s if warm else 0.0)
            if lifecycle.actual in (lifecycle_rules.UNLOADED, lifecycle_rules.FAILED):
                self.show(key, lifecycle)
        return None if waits else ends

    def _source(self, declared: DeclaredModel, version: int) -> VersionSource | Reason:
        """What a version is loaded from, or why it cannot be."""
        folder = declared.folder
        held = self._held.get(VersionKey(folder.name, version))
        reason = (declared.fault if held is None else None) or folder.faults.get(version)
        if not declared.served and version not in folder.files:
            reason = reason or none_served(folder, declared.config)
        if reason:
            return reason
        if version not in folder.files:
            return f"{folder.name}/{version} is no longer in {self._path}"
        try:
            source = read_source(folder, version, declared.config if held is None else held.config)
        except OSError as error:
            return f"{folder.name}/{version} cannot be read: {error.strerror}"
        changed = None if held is None else held.changed_file(source)
        if changed is not None:
            return (
                f"{changed} has changed since the version was loaded, and the engine that had loaded it has"
                f" ended; restore the file, use a new version folder, or load the new content:"
                f" inferpool load {folder.name} {version}"
            )
        return source

    def _succeeded(self, key: VersionKey) -> bool:
        lifecycle = self._manager.lifecycle(key)
        return lifecycle is not None and lifecycle.succeeded

    # The admin side.

    def jobs(self) -> list[Job]:
        """All jobs that run, and the last ones that have ended, oldest first."""
        return self._manager.jobs()

    def loading(self) -> list[VersionKey]:
        """The versions that load at this moment."""
        return list(self._manager.loading())

    def moves(self) -> dict[str, dict[str, tuple[int | None, int | None]]]:
        """The labels that were moved, by models: the version of each, and that of `model.toml`."""
        return {name: {label: (move.version, move.instead_of) for label, move in moves.items()}
                for name, moves in list(self._moves.items())}  # fmt: skip

    def traffic(self) -> dict[str, dict[str, Any] | None]:
        """How requests are shared out, as JSON by models; None if the default answers all again."""
        return {
            name: None if traffic is None else traffic.to_json()
            for name, traffic in list(self._traffic.items())
        }

    def removed(self) -> list[VersionKey]:
        """The versions that were shown once, and are no longer."""
        return sorted(self._removed)

    def begin_load(
        self, model: str, version: int | None, source: str | None = None, job_id: str | None = None
    ) -> Job:
        """Load a version, or all that `model.toml` serves, from the files that are there now.

        A version that is loaded from the same files is not loaded again. With a `source`, the version is
        fetched from there first, which may be a store or an absolute path. `job_id` is the id of a new job
        that fetches nothing; None makes one.

        Raises ModelNotFound or VersionNotFound if the folder has no such version. With a source, it raises
        InvalidInput, Forbidden for a source that is not allowed, or Conflict if the folder cannot take it.
        """
        if source is not None:
            return self._begin_fetch(model, version, source)
        with self._scanning:
            versions = self._ask_for(model, version)
            return self._manager.begin_job("load", model, version, versions, job_id)

    def _ask_for(self, model: str, version: int | None) -> list[int]:
        """Want a version, or all that `model.toml` serves; returns which. The caller holds the lock."""
        self._skip = {key for key in self._skip if key.model != model or version not in (None, key.version)}
        self.rescan(model)
        declared = self._declared.get(model)
        if declared is None or not (declared.found or declared.folder.origin):
            raise ModelNotFound(f'no model is called "{model[:100]}"; {self._path} has none either')
        versions = [version] if version is not None else declared.served or [1]
        if version is not None and version not in declared.found:
            have = names_text([*map(str, sorted(declared.found))])
            raise VersionNotFound(f'"{model}" has no version {version}; {self._path} has {have}')
        for number in versions:
            key = VersionKey(model, number)
            self._unloaded.discard(key)
            if number not in declared.served:
                self._asked_for.add(key)
        self._publish_model(model)
        self._tell_wanted(model, retry=versions)
        return versions

    def _begin_fetch(self, model: str, version: int | None, source: str) -> Job:
        """Fetch a version in a thread, and load it then."""
        from inferpool.repository.version_fetches import MOST_FETCHES, VersionFetches

        with self._scanning:
            fetches = self._fetches = self._fetches or VersionFetches(self._path, self._settings)
        reference = fetches.check(source)
        with self._scanning:
            declared = self._declared.get(model)
            known = None if declared is None else declared.folder
            wanted = fetches.wanted_version(model, known, self._single_model(), version, source)
            job, is_new = self._manager.begin_fetch(model, version, str(reference), wanted.key, MOST_FETCHES)

        def load_it(rename: Callable[[], int]) -> None:
            with self._scanning:
                if self._manager.is_fetching(job.id):
                    self._manager.end_fetch(job.id, self._ask_for(model, rename()))

        if is_new:
            tell, fail = self._manager.tell_fetched, self._manager.end_fetch
            fetches.start(job.id, wanted, partial(tell, job.id), load_it, partial(fail, job.id, ()))
        return job

    def _single_model(self) -> str | None:
        """The name of the only model if the models folder is that model's folder."""
        for name, declared in self._declared.items():
            folder = declared.folder.folder
            if folder is not None and folder.resolve() == self._path.resolve():
                return name
        return None

    def begin_unload(self, model: str, version: int | None, job_id: str | None = None) -> Job:
        """Drain a version, or all of the model, and free its memory; it is not loaded again by itself.

        `job_id` is the id of a new job; None makes one. Raises ModelNotFound or VersionNotFound.
        """
        with self._scanning:
            view = self._models.get(model)
            if view is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            versions = [version] if version is not None else sorted(view.versions)
            if version is not None and version not in view.versions:
                raise VersionNotFound(f'"{model}" has no version {version}')
            for number in versions:
                key = VersionKey(model, number)
                self._unloaded.add(key)
                self._asked_for.discard(key)
                self._forgotten.discard(key)
                self._manager.unwant(key)
            for number in versions:
                key = VersionKey(model, number)
                lifecycle = self._manager.lifecycle(key)
                if lifecycle is not None and lifecycle.actual == lifecycle_rules.FAILED:
                    lifecycle.unloaded()
                    self.show(key, lifecycle)
            return self._manager.begin_job("unload", model, version, versions, job_id)

    def cancel_job(self, job_id: str) -> Job | None:
        """End a job that runs; None if there is none with this id. Raises Conflict if it has ended."""
        with self._scanning:
            job = self._manager.cancel(job_id)
            if self._fetches is not None and job is not None and job.fetching:
                self._fetches.cancel(job_id)
            if job is not None and job.kind == "unload":
                self._unloaded -= {VersionKey(job.model, number) for number in job.versions}
            elif job is not None:
                for number in job.versions:
                    if not self._succeeded(VersionKey(job.model, number)):
                        self._unloaded.add(VersionKey(job.model, number))
            return job

    def take_decisions(
        self,
        moves: Mapping[str, Mapping[str, tuple[int | None, int | None]]],
        traffic: Mapping[str, Mapping[str, Any] | None],
    ) -> None:
        """Take the labels and the traffic that another engine has decided about.

        They are as `moves` and `traffic` return them.
        """
        with self._scanning:
            for model in {*moves, *traffic}:
                declared = self._declared.get(model)
                labels = {label: LabelMove(*move) for label, move in moves.get(model, {}).items()}
                if model in traffic:
                    self._traffic[model] = traffic_from_json(traffic[model])
                if labels:
                    self._moves[model] = labels
                if declared is None:
                    continue
                if labels != declared.moves:
                    declared.moves |= labels
                    declared.served = served_versions(declared.config, declared.found, declared.labels())
                self._publish_model(model)
                self._tell_wanted(model, look=False)

    def move_label(self, model: str, label: str, version: int | None, *, checked: bool = False) -> bool:
        """Let a label name `version`, in one step; None removes it. Returns whether a restart keeps that.

        Raises ModelNotFound, InvalidInput for a word that cannot be a label, or Conflict if the version is
        here and not ready. If that is `checked`, another engine may be the one that is ready.
        """
        check_label(label)
        with self._scanning:
            view, declared = self._models.get(model), self._declared.get(model)
            if view is None or declared is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            target = view.versions.get(version or 0)
            if target is not None and target.state != READY and not checked:
                raise Conflict(
                    f'"{label}" cannot name version {version} of "{model}", which is {target.state}; load it'
                    " first"
                )
            configured = declared.config.versions.labels.get(label)
            # A move back to what `model.toml` says is kept too: it must undo an earlier one.
            declared.moves[label] = LabelMove(version, configured)
            self._moves[model] = dict(declared.moves)
            kept = keep_moves(declared.folder.folder, declared.moves)
            declared.served = served_versions(declared.config, declared.found, declared.labels())
            traffic = self._traffic.get(model)
            canary = None if traffic is None else traffic.running
            if traffic is not None and canary is not None and label == STABLE and version != canary.stable:
                state = PROMOTED if version == canary.version else ENDED
                self._set_traffic(model, traffic.ended(state, "somebody has moved the label stable"))
            self._publish_model(model)
            self._tell_wanted(model, look=False)
            return kept

    def set_traffic(self, model: str, traffic: Traffic | None) -> None:
        """Share the requests for a model out from now on; None lets the default version answer all of them.

        With a canary, the label `stable` names the version beside it. Raises ModelNotFound.
        """
        with self._scanning:
            view = self._models.get(model)
            if view is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            before = self._traffic.get(model)
            if before is not None and before.running is not None:
                self._count_canary(model, ENDED)
            canary = None if traffic is None else traffic.running
            self._traffic[model] = None
            if canary is not None and view.labels.get(STABLE) != canary.stable:
                # Otherwise a restart would let the canary answer everything, if its number is the largest.
                self.move_label(model, STABLE, canary.stable)
            self._traffic[model] = traffic
            self._publish_model(model)

    def end_canary(self, model: str, number: int, state: CanaryState, reason: Reason) -> bool:
        """End the canary of the traffic of this number; a promoted one gets the label `stable`.

        Returns whether it has ended by this call: False if there is another one, or none that runs.
        """
        with self._scanning:
            traffic = self._traffic.get(model)
            canary = None if traffic is None else traffic.running
            if traffic is None or canary is None or traffic.number != number:
                return False
            self._set_traffic(model, traffic.ended(state, reason))
            if state == PROMOTED:
                self.move_label(model, STABLE, canary.version)
            self._publish_model(model)
            return True

    def _set_traffic(self, model: str, ended: Traffic) -> None:
        """Keep traffic whose canary has ended."""
        assert ended.canary is not None
        self._traffic[model] = ended
        self._count_canary(model, ended.canary.state)

    def _count_canary(self, model: str, state: CanaryState) -> None:
        self._metrics.value("canaries_total", model, state).add()

    def rollback(self, model: str) -> int:
        """Let the version answer that answered before the present one, by the label `stable`; its number.

        While a canary runs, that ends the canary: the stable version answers all requests again.

        Raises ModelNotFound, or Conflict if no other version is ready.
        """
        with self._scanning:
            view = self._models.get(model)
            if view is None:
                raise ModelNotFound(f'no model is called "{model[:100]}"')
            traffic = self._traffic.get(model)
            if traffic is not None and (canary := traffic.running) is not None:
                self.end_canary(model, traffic.number, ROLLED_BACK, "somebody has rolled it back")
                return canary.stable
            now = view.default.key.version if view.default is not None else 0
            ready = {number for number, version in view.versions.items() if version.state == READY}
            earlier = self._defaults.get(model, [])
            target = next((number for number in reversed(earlier) if number in ready - {now}), None)
            if target is None:
                target = max((number for number in ready if number < now), default=None)
            if target is None:
                raise Conflict(
                    f'"{model}" cannot be rolled back: no version is ready but the present one; load one'
                )
            self.move_label(model, STABLE, target)
            # The version that was rolled back is no version to roll back to.
            self._defaults[model] = [number for number in earlier if number not in (target, now)]
            return target

    # What the manager asks for.

    def load(self, key: VersionKey, source: VersionSource, enter: Callable[[Phase], None]) -> LoadedVersion:
        """Load a version; other versions go on serving."""
        if self._on_loading is not None:
            self._on_loading(key)
        self._load_sources[key] = source
        remeasure = key == self._remeasured
        if remeasure:
            self._remeasured = None
        self._elsewhere.pop(key, None)
        try:
            return self._loader.load(
                key,
                source.file,
                source.folder,
                source.config,
                enter,
                beside=bool(self._loaded),
                remeasure=remeasure,
            )
        except RunsElsewhere as error:
            self._elsewhere[key] = error.devices
            raise

    def fits_beside(self, source: VersionSource, others: Sequence[VersionSource]) -> bool:
        """Whether a version may load while `others` do: there is memory, and its backend can."""
        return fits_beside(source, others, self._settings.memory_bytes)

    def serve(self, key: VersionKey, loaded: LoadedVersion) -> None:
        """Let requests reach a version that is loaded, in place of what was loaded of it before."""
        before = self._loaded.get(key)
        if self._on_change is not None and loaded.codec_source is not None:
            self._codec_sources[key] = loaded.codec_source
        loaded.codec_source = None  # a tokenizer may have many megabytes
        self._metrics.add_version(key.model, str(key.version))
        with self._publishing:
            self._loaded[key] = loaded
            self._served_sources[key] = self._load_sources[key]
            self.router.add(loaded.pool)
            self._publish(loaded.view)
        batching = loaded.view.batching
        log.info(
            "%s/%d is ready after %.2f s (%s)",
            *key,
            loaded.view.load_s,
            f"batches of up to {batching.max_rows} rows"
            if batching.enabled
            else f"unbatched: {batching.reason}",
        )
        if self._idle_measuring.measured(key, loaded.waited, self._clock()):
            log.info(
                "%s/%d was measured while others had the cores for %.0f %% of the time; it is measured again"
                " when the machine is idle",
                *key,
                100 * loaded.waited,
            )
            self._look_for_idleness()
        if before is not None:
            threading.Thread(target=self._end, args=(key, before), daemon=True).start()

    def _look_for_idleness(self) -> None:
        """Measure doubtful versions again in a thread, until there is none any more."""
        with self._publishing:  # the thread may be about to end
            if not self._watches_idleness:
                self._watches_idleness = True
                threading.Thread(target=self._await_idleness, name="idle", daemon=True).start()

    def _await_idleness(self) -> None:
        while not self._draining:
            time.sleep(LOOK_S)
            with self._publishing:
                if not self._idle_measuring.waits:
                    self._watches_idleness = False
                    return
            self.measure_if_idle(self._clock())

    def measure_if_idle(self, now: float) -> None:
        """Load a version again that was measured on a busy machine, if the machine is idle at last."""
        batches = sum(count.runs for loaded in list(self._loaded.values()) for count in loaded.pool.batches())
        work = (batches, self._manager.loading(), self._manager.is_loading)
        due = self._idle_measuring.due(now, work, lambda: at_low_priority(waited_share))
        source = None if due is None else self._served_sources.get(due)
        if due is not None and source is not None and self.fits_beside(source, ()):
            log.info("%s/%d is measured again, as the machine is idle", *due)
            self._remeasured = due
            self._manager.load_again(due)

    def discard(self, loaded: LoadedVersion) -> None:
        """Free a version that was loaded in vain."""
        loaded.pool.drain(LATE_DRAIN_S)
        loaded.close()

    def retire(self, key: VersionKey) -> None:
        """Take requests away from a version, wait until its last one is answered, and free its memory."""
        if self._until_seen is not None:
            self._until_seen()
            time.sleep(ON_THEIR_WAY_S)
        loaded = self._loaded.pop(key, None)
        self._idle_measuring.forget(key)
        self._codec_sources.pop(key, None)
        self._served_sources.pop(key, None)
        if loaded is not None:
            self.router.remove(key)
            self._end(key, loaded)

    def _end(self, key: VersionKey, loaded: LoadedVersion) -> None:
        """Let a version answer what it has accepted, and free its memory."""
        held = memory_use().held
        if not loaded.pool.drain(self._settings.drain_timeout_s):
            log.error("%s/%d still runs, and keeps its memory", *key)
            return
        self.router.forget(loaded.pool)
        loaded.close()
        release_freed_memory()
        freed = held - memory_use().held
        log.info("%s/%d is unloaded; the process has %.1f MB less", *key, freed / 1e6)

    def show(self, key: VersionKey, lifecycle: VersionLifecycle) -> None:
        """Publish what a version is now."""
        with self._publishing:
            model = self._models.get(key.model)
            before = None if model is None else model.versions.get(key.version)
            if lifecycle.actual == lifecycle_rules.READY:
                if before is not None and before.state == READY and lifecycle.reason:
                    self._publish(replace(before, reason=f"a newer load has failed: {lifecycle.reason}"))
            elif lifecycle.actual == lifecycle_rules.DRAINING:
                if before is not None:
                    self._publish(replace(before, state=DRAINING))
            elif lifecycle.loading is not None:
                self._publish(VersionView(key, LOADING, beside=self._was_ready))
            elif key in self._forgotten:
                self._forgotten.discard(key)
                self._elsewhere.pop(key, None)
                self._manager.forget(key)
                self._remove(key)
            elif lifecycle.actual == lifecycle_rules.FAILED and key in self._elsewhere:
                self._remove(key, gone=False)
            elif lifecycle.actual == lifecycle_rules.FAILED:
                self._publish(VersionView(key, FAILED, lifecycle.reason))
            else:
                self._publish(VersionView(key, UNLOADED, "it was unloaded, or its load was cancelled"))

    def leave(self, key: VersionKey, lifecycle: VersionLifecycle) -> None:
        """Show a version no longer that the engine of another device shows, and unload what is here of it."""
        if lifecycle.actual == lifecycle_rules.READY:
            self._manager.unwant(key)
        with self._publishing:
            self._remove(key, gone=False)
            if self._on_change is not None:
                self._on_change()  # the other engine may have to be started

    def is_elsewhere(self, key: VersionKey) -> bool:
        """Whether the last load has left a version to the engine of another device."""
        return key in self._elsewhere

    def jobs_changed(self) -> None:
        """Publish the jobs."""
        if self._on_change is not None:
            self._on_change()

    def await_seen(self) -> None:
        """Wait until all that send requests know what is published now."""
        if self._until_seen is not None:
            self._until_seen()

    def count_load(self, key: VersionKey, outcome: Outcome) -> None:
        """Count a load that has ended."""
        self._metrics.value("loads_total", key.model, str(key.version), outcome).add()

    # Publishing.

    def _publish(self, view: VersionView) -> None:
        """Show a version, with the labels that name it."""
        key = view.key
        with self._publishing:
            model = self._models.get(key.model) or self._model_view(self._declared[key.model], {})
            view = replace(view, labels=_names(model.labels, key.version))
            if _same(model.versions.get(key.version), view):
                return
            self._removed.discard(key)
            self._set_model(
                replace(model, versions=dict(sorted({**model.versions, key.version: view}.items())))
            )

    def _remove(self, key: VersionKey, *, gone: bool = True) -> None:
        """Show a version no longer, and its model neither if that was the last version.

        Unless it is `gone`, another engine shows it.
        """
        with self._publishing:
            model = self._models.get(key.model)
            if model is None or key.version not in model.versions:
                return
            if gone:
                self._removed.add(key)
            versions = {number: view for number, view in model.versions.items() if number != key.version}
            self._set_model(replace(model, versions=versions))

    def _publish_model(self, name: str) -> None:
        """Show what the folder says of a model beside its versions."""
        with self._publishing:
            before = self._models.get(name)
            if before is None:
                return
            model = self._model_view(self._declared[name], before.versions)
            if (model.description, model.labels, model.label_fault, model.traffic) != (
                before.description, before.labels, before.label_fault, before.traffic,
            ):  # fmt: skip
                versions = {
                    number: view if view.labels == (names := _names(model.labels, number))
                    else replace(view, labels=names)
                    for number, view in before.versions.items()
                }  # fmt: skip
                self._set_model(replace(model, versions=versions))

    def _set_model(self, model: ModelView) -> None:
        """Publish a model; the caller holds the lock."""
        before = self._models.get(model.name)
        default = None if before is None else before.default
        models = {name: view for name, view in self._models.items() if name != model.name or model.versions}
        if model.versions:
            models[model.name] = model
        if default is not None and model.default is not None and model.default.key != default.key:
            defaults = self._defaults.setdefault(model.name, [])
            defaults.append(default.key.version)
            del defaults[:-MOST_DEFAULTS]
            log.info("%s: version %d answers in place of %d", *model.default.key, default.key.version)
        self._models = MappingProxyType(models)
        if self._on_change is not None:
            self._on_change()

    def _model_view(self, declared: DeclaredModel, versions: Mapping[int, VersionView]) -> ModelView:
        """A model as the folder has it, with these versions."""
        name, shown = declared.folder.name, {*declared.served, *versions}
        labels = {label: version for label, version in declared.labels().items() if version in shown}
        fault = label_fault(name, declared, sorted(shown)) or (declared.fault if versions else None)
        config, aliases = declared.config, declared.folder.aliases
        return ModelView(name, config.description, versions, labels, fault, self._traffic.get(name), aliases)

    def _first_view(self, declared: DeclaredModel) -> ModelView:
        """A model before any of its versions is loaded."""
        name = declared.folder.name
        model = self._model_view(declared, {})
        if model.label_fault is not None:
            log.warning("%s", model.label_fault)
        versions = {}
        for version in declared.served or [1]:
            key = VersionKey(name, version)
            if self._takes(key):
                source = self._source(declared, version)
                state, reason = (FAILED, source) if isinstance(source, str) else (LOADING, "")
                versions[version] = VersionView(key, state, reason, _names(model.labels, version))
        return replace(model, versions=versions)

    def _takes(self, key: VersionKey) -> bool:
        """Whether this repository serves a version."""
        return key not in self._skip and (self._only is None or key in self._only)


def _same(one: VersionView | None, other: VersionView) -> bool:
    """Whether two views of a version that is not ready, or of one load, are the same."""
    return one is not None and other.signature is one.signature and (one.state, one.reason, one.labels) == (
        other.state, other.reason, other.labels,
    )  # fmt: skip


def _names(labels: Mapping[str, int], version: int) -> tuple[str, ...]:
    """The labels that name a version."""
    return tuple(label for label, labelled in labels.items() if labelled == version)
