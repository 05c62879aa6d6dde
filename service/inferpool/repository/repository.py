"""The models that are served: loads them one after the other and publishes what is ready.

One loads at a time, so that measurements do not disturb one another; a load that does not end holds up the
others for a while only. What is served is published as a new mapping at each change; whoever reads one reads
a consistent state without a lock.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from inferpool.backends.base import backends_by_suffix
from inferpool.errors import InferpoolError
from inferpool.observe.metrics import Metrics, Sample
from inferpool.pool.ports import Outbox, VersionKey
from inferpool.pool.router import PoolRouter
from inferpool.repository.catalog import (
    FAILED,
    LOADING,
    READY,
    STATES,
    Health,
    LiveView,
    ModelView,
    State,
    VersionView,
)
from inferpool.repository.config import ModelConfig, read_config
from inferpool.repository.layout import CONFIG_FILE, ModelFolder, scan
from inferpool.repository.load.loader import Loaded, Loader
from inferpool.settings import Settings
from inferpool.system.gpus import Driver

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long a load holds up the next one. Most take seconds; some never end."""


class Repository:
    """Loads the models of a folder into pools; is the `Catalog` that the web side reads."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        outbox: Outbox,
        metrics: Metrics,
        clock: Callable[[], float],
        driver: Driver | None = None,
    ) -> None:
        """Look at what is in `path`; raises ConfigError if that is nothing to serve.

        `driver` is that of the GPUs; None is this machine's.
        """
        self.engine = PoolRouter()
        self._settings = settings
        self._metrics = metrics
        self._loader = Loader(settings, outbox, metrics, clock, driver)
        self._clock = clock
        self._loaded: dict[VersionKey, Loaded] = {}
        self._load_began: dict[VersionKey, float] = {}
        self._publishing = threading.Lock()
        self._draining = False
        self._stopped = threading.Event()
        self._folders = {model.name: model for model in scan(path, backends_by_suffix())}
        self._configs: dict[str, ModelConfig] = {}
        self._models: Mapping[str, ModelView] = MappingProxyType(
            {name: self._first_view(model) for name, model in self._folders.items()}
        )
        metrics.add_source(self._samples)

    # The catalog.

    def models(self) -> Mapping[str, ModelView]:
        """Every model by name, as it is at this moment; the mapping does not change."""
        return self._models

    def live(self, key: VersionKey) -> LiveView:
        """The changing facts of a version; empty ones if it is not loaded."""
        loaded = self._loaded.get(key)
        if loaded is None:
            began = self._load_began.get(key)
            return LiveView(loading_s=0.0 if began is None else self._clock() - began)
        pool = loaded.pool
        rows, age_s, wait_s = pool.waiting()
        return LiveView(
            pool.instances(),
            pool.profile.table(),
            rows,
            age_s,
            wait_s,
            pool.wrong_rows,
            pool.batches(),
            pool.rungs(),
            loaded.instances.tensorrt,
        )

    def health(self) -> Health:
        """Whether every required model can answer, and what is wrong with what."""
        problems: dict[str, str] = {}
        loading, answering = set(), set()
        for model in self._models.values():
            for version in model.versions.values():
                name = f"{model.name}/{version.key.version}"
                if version.state == READY:
                    instances = self.live(version.key).instances
                    lost = sum(instance.state != "ready" for instance in instances)
                    if lost:
                        problems[name] = f"{lost} of {len(instances)} instances are lost"
                    if lost < len(instances):
                        answering.add(model.name)
                elif version.state == LOADING:
                    loading.add(model.name)
                    problems[name] = f"loading for {self.live(version.key).loading_s:.0f} s"
                else:
                    problems[name] = version.reason or version.state
        required = set(self._settings.required_models) or {
            model.name
            for model in self._models.values()
            if any(version.state in (READY, LOADING) for version in model.versions.values())
        }
        problems.update(dict.fromkeys(required - set(self._models), "required, but not in the repository"))
        ready = bool(answering) and required <= answering - loading and not self._draining
        if self._draining:
            return Health(False, "draining", problems)
        if ready:
            return Health(True, "degraded" if problems else "ok", problems)
        return Health(False, "loading" if loading else "unavailable", problems)

    # Life.

    def start(self, then: Callable[[], None]) -> None:
        """Begin to load, in a thread of its own; it calls `then` when everything is loaded or failed.

        Where loads take too long it calls `then` when all others are, too.
        """
        threading.Thread(target=self._load_all, args=(then,), name="loader", daemon=True).start()

    def load_now(self) -> None:
        """Load everything before returning."""
        self._load_all(lambda: None)

    def begin_drain(self) -> None:
        """Be no longer ready; what is accepted still runs."""
        self._draining = True

    def drain(self, timeout_s: float) -> bool:
        """Finish what was accepted and end every instance; False if that took longer than `timeout_s`."""
        self.begin_drain()
        self._stopped.set()
        deadline = self._clock() + timeout_s
        ended = [pool.drain(max(0.0, deadline - self._clock())) for pool in self.engine.pools()]
        return all(ended)

    def _load_all(self, then: Callable[[], None]) -> None:
        late: list[threading.Thread] = []
        for name, model in self._folders.items():
            for version in sorted(self._models[name].versions, reverse=True):
                if self._stopped.is_set():
                    return
                if self._models[name].versions[version].state == LOADING:
                    work = threading.Thread(target=self._load, args=(model, version), daemon=True)
                    work.start()
                    work.join(PATIENCE_S)
                    if work.is_alive():
                        late.append(work)
                        log.warning(
                            "%s/%d has been loading for %.0f s; the next are loaded beside it",
                            name, version, PATIENCE_S,
                        )  # fmt: skip
        if late:
            then()
        for work in late:
            work.join()
        then()

    def _load(self, model: ModelFolder, version: int) -> None:
        key = VersionKey(model.name, version)
        self._load_began[key] = self._clock()
        try:
            loaded = self._loader.load(key, model.files[version], model.folder, self._configs[model.name])
        except InferpoolError as error:
            self._fail(key, error.detail)
        except BaseException as error:
            # What a model's code or a native library raises to end the process ends this version only.
            log.exception("loading %s/%d", model.name, version)
            self._fail(key, f"loading failed with {type(error).__name__}: {error}")
        else:
            self._loaded[key] = loaded
            self._metrics.add_version(model.name, str(version))
            self.engine.add(loaded.pool)
            labels = self._models[model.name].versions[version].labels
            self._publish(replace(loaded.view, labels=labels))
            batching = loaded.view.batching
            log.info(
                "%s/%d is ready after %.2f s (%s)",
                model.name,
                version,
                loaded.view.load_s,
                f"batches of up to {batching.max_rows} rows"
                if batching.enabled
                else f"unbatched: {batching.reason}",
            )
        finally:
            del self._load_began[key]

    def _fail(self, key: VersionKey, reason: str) -> None:
        log.error("%s/%d has failed: %s", key.model, key.version, reason)
        self._publish(replace(self._models[key.model].versions[key.version], state=FAILED, reason=reason))

    def _publish(self, view: VersionView) -> None:
        with self._publishing:
            model = self._models[view.key.model]
            versions = {**model.versions, view.key.version: view}
            self._models = MappingProxyType({**self._models, model.name: replace(model, versions=versions)})

    def _first_view(self, model: ModelFolder) -> ModelView:
        """A model before anything of it is loaded."""
        fault = ""
        config = ModelConfig()
        try:
            if model.folder is not None:
                config = read_config(model.folder / CONFIG_FILE)
        except InferpoolError as error:
            fault = error.detail
        self._configs[model.name] = config
        served = _served(config, [*model.files, *model.faults])
        names: dict[int, tuple[str, ...]] = {}
        for label, version in config.versions.labels.items():
            names[version] = (*names.get(version, ()), label)
            if version not in served:
                fault = fault or f"{model.name}/model.toml: versions.labels: there is no version {version}"
        versions = {}
        for version in served or [1]:
            reason = fault or model.faults.get(version, "")
            if not served:
                reason = reason or _none_served(model, config)
            state: State = FAILED if reason else LOADING
            key = VersionKey(model.name, version)
            versions[version] = VersionView(key, state, reason, names.get(version, ()))
        return ModelView(model.name, config.description, versions, config.versions.labels)

    def _samples(self) -> Iterable[Sample]:
        """Gauges for a scrape."""
        for model in self._models.values():
            for version in model.versions.values():
                labels = (model.name, str(version.key.version))
                for state in STATES:
                    yield "model_state", (*labels, state), float(version.state == state)
                if version.state != READY:
                    continue
                live = self.live(version.key)
                yield "model_load_seconds", labels, version.load_s
                if version.gpu is not None:
                    yield "cpu_nodes", labels, float(sum(version.gpu.cpu_nodes.values()))
                yield "queue_rows", labels, float(live.waiting_rows)
                yield "queue_oldest_age_seconds", labels, live.oldest_age_s
                yield "queue_wait_seconds", labels, live.wait_s
                counts = Counter((instance.device, instance.state) for instance in live.instances)
                for of, count in counts.items():
                    yield "instances", (*labels, *of), float(count)


def _none_served(model: ModelFolder, config: ModelConfig) -> str:
    found = sorted([*model.files, *model.faults])
    if found:
        have = ", ".join(map(str, found))
        return (
            f"{model.name}/model.toml: versions.serve: {config.versions.serve} is not there; there is {have}"
        )
    return f"{model.name} has no version: expected {model.name}/1/model.onnx"


def _served(config: ModelConfig, found: list[int]) -> list[int]:
    wanted = config.versions.serve
    if wanted == "latest":
        return sorted({max(found, default=0), *config.versions.labels.values()} & set(found))
    return sorted(found) if wanted == "all" else sorted(set(wanted) & set(found))
