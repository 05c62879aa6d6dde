"""The catalog of a web process, whose models run in engines.

The supervisor sends what is served: models, versions and their states. The engines tell the facts that
change, when they are asked. No runtime is imported for any of this.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

from inferpool.engine.catalog_merge import codecs_key
from inferpool.errors import LoadError, Reason
from inferpool.pool.ports import VersionKey
from inferpool.pool.stats import BatchCount, InstanceState
from inferpool.repository.catalog import FAILED, READY, EngineView, Health, LiveView, ModelView, VersionView
from inferpool.repository.catalog_json import (
    NO_CODECS,
    JsonObject,
    live_from_json,
    model_from_json,
    source_from_json,
    version_from_json,
)
from inferpool.repository.codec_factory import Codecs, make_codecs
from inferpool.repository.health import judge
from inferpool.repository.jobs import Job

log = logging.getLogger(__name__)

ASK_TIMEOUT_S: Final = 0.5
"""How long an engine may take to tell the facts that change."""

SILENT_S: Final = 5.0
"""For how long an engine may leave questions without an answer until its versions are not ready."""

RESTARTING: Final = "its engine is being restarted"
NOT_ANSWERING: Final = "not_answering"
"""The state of an instance whose engine does not answer, or is being restarted."""

Ask: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Asks an engine; raises an OSError or TimeoutError if there is no answer."""


class _Sent(NamedTuple):
    """A version as it was sent, and the view that was made of it."""

    sent: JsonObject
    view: VersionView


class RemoteCatalog:
    """What is served, as the supervisor and the engines tell it.

    `update` is called in one thread at a time, which may be any; `engine_up`, `engine_down` and `refresh` are
    called in the thread of the event loop. All other methods may be called in any thread.
    """

    def __init__(self, clock: Callable[[], float], required_models: Collection[str] = ()) -> None:
        self._clock = clock
        self._required_models = required_models
        self._draining = False
        self._models: Mapping[str, ModelView] = MappingProxyType({})
        self._versions: dict[VersionKey, _Sent] = {}
        self._codecs: dict[str, Codecs] = {}
        self._asks: dict[str, Ask] = {}
        self._silent_since: dict[str, float] = {}
        self._engines: Mapping[str, Mapping[str, Any]] = {}
        self._live: dict[VersionKey, dict[str, LiveView]] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._jobs: tuple[Job, ...] = ()

    def models(self) -> Mapping[str, ModelView]:
        """Every model by name, as it is at this moment; the mapping does not change."""
        return self._models

    def live(self, key: VersionKey) -> LiveView:
        """The facts about a version that change, as the last `refresh` found them; empty if none did."""
        return replace(
            self._told(key),
            engine=self._engine_view(self.engine_of(key)),
            engines=self._engine_views(key),
            missing=tuple(self._faults_of(key)),
        )

    def health(self) -> Health:
        """Whether every required model can answer, as the last `refresh` found it."""
        return judge(
            self._models,
            self._told,
            self._required_models,
            draining=self._draining,
            faults=self._engine_fault,
        )

    def jobs(self) -> Sequence[Job]:
        """All jobs that run, and the last ones that have ended, oldest first."""
        return self._jobs

    def engine_of(self, key: VersionKey) -> str | None:
        """The name of the engine that has a version, or had it last; None if no engine has it."""
        known = self._versions.get(key)
        engine: str | None = None if known is None else known.sent["engine"]
        return engine

    def engines_of(self, key: VersionKey) -> Sequence[str]:
        """The names of the engines that have a version ready, or had when they were restarted.

        Of a version that is not ready, the engine that has it, or had it last.
        """
        known = self._versions.get(key)
        if known is None:
            return ()
        engines: Sequence[str] = known.sent["engines"]
        return engines or [name for name in [known.sent["engine"]] if name is not None]

    async def refresh(self) -> None:
        """Ask all engines for the facts that change; waits for `ASK_TIMEOUT_S` at most."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._ask_all())
        await asyncio.shield(self._refreshing)

    def begin_drain(self) -> None:
        """Report that the server is not ready; requests that were accepted still run."""
        self._draining = True

    def engine_up(self, engine: str, ask: Ask) -> None:
        """Note that an engine can be asked from now on."""
        self._asks[engine] = ask
        self._silent_since.pop(engine, None)

    def engine_down(self, engine: str) -> None:
        """Note that an engine has ended."""
        self._asks.pop(engine, None)

    def update(self, catalog: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Take a catalog in place of the last one; `files` has the contents that new codecs are made from.

        Making codecs may take a second, so the event loop should call this in a thread.
        """
        models: dict[str, ModelView] = {}
        versions: dict[VersionKey, _Sent] = {}
        codecs: dict[str, Codecs] = {}
        for name, model in catalog["models"].items():
            for sent in model["versions"].values():
                key = VersionKey(*sent["key"])
                known = self._versions.get(key)
                view = None if known is None or not _same_view(known.sent, sent) else known.view
                if sent["codecs"]:
                    source = codecs_key(sent["codecs"])
                    if source in self._codecs:
                        codecs[source] = self._codecs[source]
                    elif view is None and source not in codecs:
                        try:
                            codecs[source] = make_codecs(source_from_json(sent["codecs"], files), key.model)
                        except (LoadError, KeyError, ValueError) as error:
                            log.error("the codecs of %s/%d cannot be made: %s", *key, error)
                            view = _failed(sent, f"its codecs cannot be made in a web process: {error}")
                    if view is None:
                        view = version_from_json(sent, codecs[source])
                versions[key] = _Sent(sent, view or version_from_json(sent, NO_CODECS))
            views = {key.version: item.view for key, item in versions.items() if key.model == name}
            before = self._models.get(name)
            made = model_from_json(name, model, views)
            models[name] = before if before is not None and _same_model(before, made) else made
        self._versions, self._codecs, self._engines = versions, codecs, catalog["engines"]
        self._jobs = tuple(map(Job.from_json, catalog["jobs"]))
        # The mapping comes last: it is what requests look at, and it stays the same if nothing changed.
        if models.keys() != self._models.keys() or any(
            models[name] is not self._models[name] for name in models
        ):
            self._models = MappingProxyType(models)

    def _told(self, key: VersionKey) -> LiveView:
        """What the engines of a version told at the last `refresh`, without views of the engines."""
        told = self._live.get(key, {})
        views = [
            _not_answering(told[name]) if self._fault_of(key, name) is not None else told[name]
            for name in self.engines_of(key)
            if name in told
        ]
        return combine(views)

    def _engine_view(self, engine: str | None) -> EngineView | None:
        facts = self._engines.get(engine or "")
        return None if facts is None else EngineView(engine or "", facts["pid"], facts["restarts"])

    def _engine_views(self, key: VersionKey) -> Sequence[EngineView]:
        return tuple(filter(None, map(self._engine_view, self.engines_of(key))))

    def _engine_fault(self, key: VersionKey) -> tuple[Reason | None, bool]:
        """What is wrong with the engines of a version, and whether the version can answer all the same."""
        known = self._versions.get(key)
        if known is None or known.view.state != READY:
            return None, True
        engines = self.engines_of(key)
        wrong = self._faults_of(key)
        reachable = any(self._answers(key, name) for name in engines)
        if len({*engines, *wrong}) == 1:
            return next(iter(wrong.values()), None), reachable
        return "; ".join(f"{name}: {fault}" for name, fault in wrong.items()) or None, reachable

    def _faults_of(self, key: VersionKey) -> dict[str, Reason]:
        """Return the fault of each engine that cannot run a version that is ready, by the engine's name."""
        known = self._versions.get(key)
        if known is None or known.view.state != READY:
            return {}
        found = {name: self._fault_of(key, name) for name in self.engines_of(key)}
        wrong = {name: fault for name, fault in found.items() if fault is not None}
        wrong.update(known.sent["faults"])
        return wrong

    def _fault_of(self, key: VersionKey, engine: str) -> Reason | None:
        """What is wrong with one of the engines of a version that is ready."""
        known = self._versions.get(key)
        if known is None or known.view.state != READY:
            return None
        if engine in known.sent["absent"] or engine not in self._asks:
            return RESTARTING
        since = self._silent_since.get(engine)
        return None if since is None else f"its engine has not answered for {self._clock() - since:.0f} s"

    def _answers(self, key: VersionKey, engine: str) -> bool:
        """Whether an engine can run a version, although it may not answer questions at the moment."""
        if self._fault_of(key, engine) == RESTARTING:
            return False
        since = self._silent_since.get(engine)
        return since is None or self._clock() - since < SILENT_S

    async def _ask_all(self) -> None:
        try:
            await asyncio.gather(*(self._ask(engine, ask) for engine, ask in list(self._asks.items())))
        finally:
            self._refreshing = None

    async def _ask(self, engine: str, ask: Ask) -> None:
        asked = self._clock()
        try:
            answer = await asyncio.wait_for(ask({"live": True}), ASK_TIMEOUT_S)
            found = {
                VersionKey(model, number): live_from_json(live) for model, number, live in answer["live"]
            }
        except (OSError, TimeoutError):
            if self._asks.get(engine) is ask:
                self._silent_since.setdefault(engine, asked)
        except (LookupError, TypeError, ValueError):
            log.exception("engine %s gave an answer that cannot be read", engine)
        else:
            self._silent_since.pop(engine, None)
            for key, live in found.items():
                told = self._live.setdefault(key, {})
                told[engine] = live
                for name in [name for name in told if name not in self.engines_of(key) and name != engine]:
                    del told[name]


def combine(views: Sequence[LiveView]) -> LiveView:
    """The facts about a version in several engines: the instances of all, and the rows that wait anywhere."""
    if not views:
        return LiveView()
    if len(views) == 1:
        return views[0]
    batches: dict[int, BatchCount] = {}
    for view in views:
        for rows, runs, compute_s in view.batches:
            _, ran, ran_s = batches.get(rows, (rows, 0, 0.0))
            batches[rows] = BatchCount(rows, ran + runs, ran_s + compute_s)
    stopped = (view.batching_stopped for view in views)
    return replace(
        views[0],
        instances=tuple(instance for view in views for instance in view.instances),
        waiting_rows=sum(view.waiting_rows for view in views),
        oldest_age_s=max(view.oldest_age_s for view in views),
        wait_s=max(view.wait_s for view in views),
        batching_stopped=next(filter(None, stopped), None),
        batches=tuple(sorted(batches.values())),
        loading_s=max(view.loading_s for view in views),
        phase=next(filter(None, (view.phase for view in views)), None),
    )


def _not_answering(live: LiveView) -> LiveView:
    return replace(
        live, instances=[InstanceState(instance.device, NOT_ANSWERING) for instance in live.instances]
    )


def _same_view(one: JsonObject, other: JsonObject) -> bool:
    """Whether two versions that were sent have the same view, on whatever engines they are."""
    others = ("engine", "engines", "absent", "faults", "reloading")
    return {k: v for k, v in one.items() if k not in others} == {
        k: v for k, v in other.items() if k not in others
    }


def _same_model(one: ModelView, other: ModelView) -> bool:
    return (
        (one.description, one.labels, one.label_fault, one.traffic, one.aliases)
        == (other.description, other.labels, other.label_fault, other.traffic, other.aliases)
        and one.versions.keys() == other.versions.keys()
        and all(one.versions[number] is other.versions[number] for number in one.versions)
    )


def _failed(sent: JsonObject, reason: Reason) -> VersionView:
    return replace(version_from_json(sent), state=FAILED, reason=reason)
