"""The models folder at work: loads its versions one after the other and publishes those that are ready.

One version loads at a time, so that measurements do not disturb one another. A load that does not end delays
the next one for `health.PATIENCE_S` only, and fails after the setting `load_timeout_s`. Each change is
published as a new mapping, so that readers see a consistent state without a lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

from inferpool.backends.registry import backends_by_suffix
from inferpool.errors import ConfigError, InferpoolError, Reason
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Outbox, VersionKey
from inferpool.pool.router import PoolRouter
from inferpool.repository import health
from inferpool.repository.catalog import (
    FAILED,
    LOADING,
    Health,
    LiveView,
    ModelView,
    State,
    VersionView,
)
from inferpool.repository.catalog_readings import catalog_readings
from inferpool.repository.codec_factory import CodecSource
from inferpool.repository.config import ModelConfig, read_config
from inferpool.repository.layout import CONFIG_FILE, ModelFolder, scan
from inferpool.repository.load.loader import LoadedVersion, Loader
from inferpool.settings import Settings
from inferpool.system.gpus import Driver

log = logging.getLogger(__name__)


LATE_DRAIN_S: Final = 1.0
"""How long the instances of a version that has loaded too late may take to end."""


class _Load:
    """A load under way, which has one result: whoever claims it first decides.

    Attributes:
        key: the version.
        model: where it is on disk.
        ended: set when the version is ready or has failed.
    """

    def __init__(self, key: VersionKey, model: ModelFolder) -> None:
        self.key = key
        self.model = model
        self.ended = threading.Event()
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Whether the caller decides what becomes of the version: true once."""
        return self._claim.acquire(blocking=False)


class Repository:
    """Loads the models of a folder into pools. The web side reads it as its `Catalog`."""

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
    ) -> None:
        """Look for models in `path`; raises ConfigError if there are none.

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
        """
        self.router = PoolRouter()
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
        )
        self._clock = clock
        self._loaded: dict[VersionKey, LoadedVersion] = {}
        self._load_began: dict[VersionKey, float] = {}
        self._publishing = threading.Lock()
        self._draining = False
        self._stopped = threading.Event()
        self._only = None if only is None else frozenset(only)
        self._skip = frozenset(skip)
        self._on_loading = on_loading
        self._on_change = on_change
        self._codec_sources: dict[VersionKey, CodecSource] = {}
        self._folders = {model.name: model for model in self._scan(path)}
        self._configs: dict[str, ModelConfig] = {}
        self._models: Mapping[str, ModelView] = MappingProxyType(
            {
                name: view
                for name, model in self._folders.items()
                if (view := self._first_view(model)).versions
            }
        )
        metrics.add_source(partial(catalog_readings, self), published=False)

    def _scan(self, path: Path) -> list[ModelFolder]:
        """The models in `path`, and those of `only` that are not there."""
        try:
            found = scan(path, backends_by_suffix())
        except ConfigError:
            if self._only is None:
                raise
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
            began = self._load_began.get(key)
            return LiveView(loading_s=0.0 if began is None else self._clock() - began)
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
        )

    def health(self) -> Health:
        """Whether every required model can answer, and the problems there are."""
        return health.judge(self._models, self.live, self._settings.required_models, draining=self._draining)

    async def refresh(self) -> None:
        """Do nothing: `live` and `health` are always up to date."""

    def plans(self) -> Mapping[str, str]:
        """The measured plans of the versions, by which another process can load them without measuring."""
        return self._loader.plans()

    def codec_sources(self) -> Mapping[VersionKey, CodecSource]:
        """What the codecs of the versions that are loaded were made from; empty without `on_change`."""
        return dict(self._codec_sources)

    def loaded(self, key: VersionKey) -> LoadedVersion:
        """The version that was loaded under `key`, with its pool and its models; raises KeyError."""
        return self._loaded[key]

    def start(self, on_loaded: Callable[[], None]) -> None:
        """Begin to load in a thread, which calls `on_loaded` when every version is ready or failed.

        If a load takes too long, the thread also calls `on_loaded` when all the others have ended.
        """
        threading.Thread(target=self._load_all, args=(on_loaded,), name="loader", daemon=True).start()

    def load_now(self) -> None:
        """Load everything before returning."""
        self._load_all(lambda: None)

    @property
    def is_loading(self) -> bool:
        """Whether a thread loads a version at this moment."""
        return bool(self._load_began)

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
        self._stopped.set()
        deadline = self._clock() + timeout_s
        ended = [pool.drain(max(0.0, deadline - self._clock())) for pool in self.router.pools()]
        return all(ended)

    def close(self) -> None:
        """Free the memory of every model. The instances have ended."""
        for loaded in self._loaded.values():
            loaded.close()

    def _load_all(self, on_loaded: Callable[[], None]) -> None:
        loads: list[_Load] = []
        for name in self._models:
            model = self._folders[name]
            for version in sorted(self._models[name].versions, reverse=True):
                if self._stopped.is_set():
                    return
                if self._models[name].versions[version].state == LOADING:
                    loads.append(_Load(VersionKey(name, version), model))
                    if not self._run(loads[-1]):
                        log.warning(
                            "%s/%d has been loading for %.0f s; the next models load beside it",
                            name, version, health.PATIENCE_S,
                        )  # fmt: skip
        late = [load for load in loads if not load.ended.is_set()]
        if late:
            on_loaded()
        for load in late:
            load.ended.wait()
        on_loaded()

    def _run(self, load: _Load) -> bool:
        """Load a version in a thread; False if that has not ended after `health.PATIENCE_S`."""
        timer = threading.Timer(self._settings.load_timeout_s, self._give_up, (load,))
        timer.daemon = True
        if self._on_loading is None:
            timer.start()
        threading.Thread(target=self._load, args=(load, timer.cancel), daemon=True).start()
        return load.ended.wait(health.PATIENCE_S)

    def _give_up(self, load: _Load) -> None:
        """Fail a version that is still loading. Nothing can end its thread, whose result is thrown away."""
        if load.claim():
            limit_s = self._settings.load_timeout_s
            self._fail(load.key, f"loading takes longer than {limit_s:g} s; --load-timeout-s allows more")
            load.ended.set()

    def _load(self, load: _Load, then: Callable[[], None]) -> None:
        key, model = load.key, load.model
        self._load_began[key] = self._clock()
        try:
            if self._on_loading is not None:
                self._on_loading(key)
            loaded = self._loader.load(key, model.files[key.version], model.folder, self._configs[model.name])
        except InferpoolError as error:
            if load.claim():
                self._fail(key, error.detail)
        except BaseException as error:
            # A model's code or a native library may raise SystemExit: that fails this version only.
            log.exception("loading %s/%d", *key)
            if load.claim():
                self._fail(key, f"loading failed with {type(error).__name__}: {error}")
        else:
            if load.claim():
                self._serve(key, loaded)
            else:
                log.warning("%s/%d is loaded, too late", *key)
                loaded.pool.drain(LATE_DRAIN_S)
                loaded.close()
        finally:
            del self._load_began[key]
            then()
            load.ended.set()

    def _serve(self, key: VersionKey, loaded: LoadedVersion) -> None:
        """Let requests reach a version that is loaded."""
        self._loaded[key] = loaded
        if self._on_change is not None and loaded.codec_source is not None:
            self._codec_sources[key] = loaded.codec_source
        loaded.codec_source = None  # a tokenizer may have many megabytes
        self._metrics.add_version(key.model, str(key.version))
        self.router.add(loaded.pool)
        labels = self._models[key.model].versions[key.version].labels
        self._publish(replace(loaded.view, labels=labels))
        batching = loaded.view.batching
        log.info(
            "%s/%d is ready after %.2f s (%s)",
            *key,
            loaded.view.load_s,
            f"batches of up to {batching.max_rows} rows"
            if batching.enabled
            else f"unbatched: {batching.reason}",
        )

    def _fail(self, key: VersionKey, reason: str) -> None:
        log.error("%s/%d has failed: %s", key.model, key.version, reason)
        self._publish(replace(self._models[key.model].versions[key.version], state=FAILED, reason=reason))

    def _publish(self, view: VersionView) -> None:
        with self._publishing:
            model = self._models[view.key.model]
            versions = {**model.versions, view.key.version: view}
            self._models = MappingProxyType({**self._models, model.name: replace(model, versions=versions)})
        if self._on_change is not None:
            self._on_change()

    def _first_view(self, model: ModelFolder) -> ModelView:
        """A model before any of its versions is loaded."""
        fault: Reason | None = None
        config = ModelConfig()
        try:
            if model.folder is not None:
                config = read_config(model.folder / CONFIG_FILE)
        except InferpoolError as error:
            fault = error.detail
        self._configs[model.name] = config
        found = {*model.files, *model.faults}
        served = _served(config, found)
        if self._only is not None:
            # A version that was served stays served, even if a newer one is there now.
            taken = {key.version for key in self._only if key.model == model.name}
            served = sorted({*served, *(taken & found)})
        labels = {label: version for label, version in config.versions.labels.items() if version in served}
        label_fault = _label_fault(model.name, config, served)
        if label_fault is not None:
            log.warning("%s", label_fault)
        versions = {}
        for version in filter(partial(self._takes, model.name), served or [1]):
            reason = fault or model.faults.get(version)
            if not served:
                reason = reason or _none_served(model, config)
            state: State = LOADING if reason is None else FAILED
            names = tuple(label for label, labelled in labels.items() if labelled == version)
            versions[version] = VersionView(VersionKey(model.name, version), state, reason or "", names)
        return ModelView(model.name, config.description, versions, labels, label_fault)

    def _takes(self, model: str, version: int) -> bool:
        """Whether this repository serves a version."""
        key = VersionKey(model, version)
        return key not in self._skip and (self._only is None or key in self._only)


def _label_fault(model: str, config: ModelConfig, served: list[int]) -> Reason | None:
    """Which labels name a version that is not served, and what to do; None if there are none."""
    stale = {label: version for label, version in config.versions.labels.items() if version not in served}
    if not stale or not served:
        return None
    labels = ", ".join(f'"{label}" names version {version}' for label, version in stale.items())
    have = ", ".join(map(str, served))
    return (
        f"{model}/model.toml: versions.labels: {labels}, which is not served; correct the label"
        f" or remove it (served: {have})"
    )


def _none_served(model: ModelFolder, config: ModelConfig) -> Reason:
    found = sorted([*model.files, *model.faults])
    if found:
        have = ", ".join(map(str, found))
        return (
            f"{model.name}/model.toml: versions.serve: {config.versions.serve} is not there; there is {have}"
        )
    reason = f"{model.name} has no version: expected {model.name}/1/model.onnx"
    return "; ".join((reason, *model.skipped))


def _served(config: ModelConfig, found: Collection[int]) -> list[int]:
    wanted = config.versions.serve
    if wanted == "latest":
        return sorted({max(found, default=0), *config.versions.labels.values()} & set(found))
    return sorted(found) if wanted == "all" else sorted(set(wanted) & set(found))
