"""Merges the catalogs of several engines into the one that web processes have. Plain JSON values only.

An engine shows the versions that it has taken. Each version is shown by the engine that has it; a version
that no engine shows at the moment keeps its last view, because its engine is being restarted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from inferpool.engine.restart_policy import SHARED

JsonObject: TypeAlias = dict[str, Any]

MOST_ORPHANS: Final = 100
"""How many jobs are remembered whose engines have ended."""
_RANKS: Final = {"ready": 0, "loading": 1, "draining": 2, "failed": 3, "unloaded": 4}
"""If two engines show a version, the one counts that can answer, or is about to."""


class EngineFacts(NamedTuple):
    """The facts that the supervisor knows about an engine.

    Attributes:
        pid: the id of its process; 0 while there is none.
        restarts: how many engines this one has replaced.
        up: whether its process lives and its control connection is open.
    """

    pid: int
    restarts: int
    up: bool


def merge(
    earlier: Mapping[str, Any],
    reports: Mapping[str, Mapping[str, Any]],
    engines: Mapping[str, EngineFacts],
    failed: Mapping[tuple[str, int], str],
    moved: Mapping[tuple[str, int], str] = {},
) -> JsonObject:
    """The catalog of the whole server.

    Args:
        earlier: what this function returned last; empty at first.
        reports: the catalog of each engine, by the engine's name.
        engines: the facts about each engine.
        failed: the versions that the supervisor has failed, with the reason.
        moved: the engines of versions that are no more where they were.

    Each version gets the keys `engine`, the name of the engine that has it or had it last (None if the
    version has failed for good), and `reloading`: whether it was ready before its engine was restarted and is
    not ready again yet. Requests for such a version wait, so its state stays `ready`.
    """
    models: dict[str, JsonObject] = {}
    # The engine that comes first decides about labels; see `decides`.
    ordered = [reports[engine]["models"] for engine in sorted(reports, key=decides, reverse=True)]
    for source in (earlier.get("models", {}), *ordered):
        for name, model in source.items():
            merged = models.setdefault(name, {**model, "versions": {}})
            merged.update({key: value for key, value in model.items() if key != "versions"})
    removed = {
        (name, int(number)) for report in reports.values() for name, number in report.get("removed", ())
    }
    for name, model in models.items():
        before = earlier.get("models", {}).get(name, {}).get("versions", {})
        shown = {
            engine: report["models"][name]["versions"]
            for engine, report in reports.items()
            if name in report["models"]
        }
        kept = {number for number in before if (name, int(number)) not in removed}
        numbers = {*kept, *(number for versions in shown.values() for number in versions)}
        model["versions"] = {
            number: _version(
                before.get(number),
                {engine: versions[number] for engine, versions in shown.items() if number in versions},
                engines,
                failed.get((name, int(number))),
                moved.get((name, int(number))),
            )
            for number in sorted(numbers, key=int)
        }
        for number, view in model["versions"].items():
            view["labels"] = [label for label, named in model["labels"].items() if named == int(number)]
    models = {name: model for name, model in models.items() if model["versions"]}
    return {"models": models, "engines": {name: facts._asdict() for name, facts in engines.items()}}


def decides(engine: str) -> tuple[bool, str]:
    """Sorts engines: of those that show a model, the first one decides about its labels."""
    return engine != SHARED, engine


def _version(
    before: Mapping[str, Any] | None,
    shown: Mapping[str, Mapping[str, Any]],
    engines: Mapping[str, EngineFacts],
    failure: str | None,
    moved: str | None,
) -> JsonObject:
    """One version: as it was before, and as each engine shows it."""
    # A version that gets an engine of its own is in two for a while.
    engine = min(shown, key=lambda name: (_RANKS[shown[name]["state"]], name == SHARED), default=None)
    if engine is None:
        assert before is not None  # a version is known from one of the two
        view = {**before, "engine": moved or before["engine"], "reloading": before["state"] == "ready"}
        if before["state"] == "draining":
            # Its engine ended meanwhile, and the successor does not load the version again.
            view |= {"state": "unloaded", "reason": "it was unloaded"}
    else:
        view = {**shown[engine], "engine": engine, "reloading": False}
        if view["state"] == "loading" and before is not None and before["state"] == "ready":
            view = {**before, "labels": view["labels"], "engine": engine, "reloading": True}
        if before is not None and before.get("beside"):
            view["beside"] = True  # if its load ends an engine, the server is ready all the same
    facts = engines.get(view["engine"] or "")
    if view["state"] == "ready" and (facts is None or not facts.up):
        view["reloading"] = True
    if failure is not None:
        view |= {"state": "failed", "reason": failure, "engine": None, "reloading": False}
    return view


class CatalogStore:
    """The catalogs of all engines, and the part of them that each web process has."""

    def __init__(self) -> None:
        self._reports: dict[str, Mapping[str, Any]] = {}
        self._engines: dict[str, EngineFacts] = {}
        self._failed: dict[tuple[str, int], str] = {}
        self._moved: dict[tuple[str, int], str] = {}
        self._files: dict[str, bytes] = {}
        self._plans: dict[str, Mapping[str, str]] = {}
        self._held: dict[tuple[str, int], JsonObject] = {}
        self._sent: dict[str, JsonObject] = {}
        self._moves: dict[str, Any] = {}
        self._traffic: dict[str, Any] = {}
        self._orphans: dict[str, JsonObject] = {}
        self._catalog: JsonObject = {"models": {}, "engines": {}, "jobs": []}

    @property
    def catalog(self) -> JsonObject:
        """The catalog of the whole server, as `merge` describes it. It is not to be changed."""
        return self._catalog

    @property
    def plans(self) -> Mapping[str, str]:
        """The plans that engines have measured, as JSON by the names of their files, for their successors."""
        return {name: plan for plans in self._plans.values() for name, plan in plans.items()}

    @property
    def moves(self) -> Mapping[str, Any]:
        """The labels that were moved, as JSON by the names of the models, for the successors of engines."""
        return self._moves

    @property
    def traffic(self) -> Mapping[str, Any]:
        """How requests are shared out, as JSON by the names of the models, for the successors of engines."""
        return self._traffic

    def engine_of_job(self, job_id: str) -> str | None:
        """The engine that has a job; None if there is none."""
        for engine, report in self._reports.items():
            if any(job["id"] == job_id for job in report.get("jobs", ())):
                return engine
        return None

    def engine_of_model(self, model: str) -> str | None:
        """The engine that decides about a model; None if no engine shows it."""
        return min((name for name, report in self._reports.items() if model in report["models"]),
                   key=decides, default=None)  # fmt: skip

    def engine_of_version(self, model: str, version: int) -> str | None:
        """The engine that has a version, or had it last; None if no engine has it."""
        views = self._catalog["models"].get(model, {"versions": {}})["versions"]
        engine: str | None = views.get(str(version), {"engine": None})["engine"]
        return engine

    @property
    def held(self) -> list[tuple[str, int, JsonObject]]:
        """What the versions in the catalog were loaded from last: model, number and source."""
        known = set(self.versions())
        return [(*version, source) for version, source in self._held.items() if version in known]

    def versions(self, *states: str) -> list[tuple[str, int]]:
        """The versions in one of `states` (all versions without any), as model names and numbers."""
        return [
            (name, int(number))
            for name, model in self._catalog["models"].items()
            for number, view in model["versions"].items()
            if not states or view["state"] in states
        ]

    def take(self, engine: str, catalog: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Take the catalog of an engine in place of its last one, with the files that are new."""
        self._reports[engine] = catalog
        self._files.update(files)
        self._plans[engine] = catalog.get("plans", {})
        self._held.update(((model, number), source) for model, number, source in catalog.get("held", ()))
        self._moves.update(catalog.get("moves", {}))
        # Another engine that shows the model may have what it was told when it started.
        self._traffic.update(
            (model, traffic)
            for model, traffic in catalog.get("traffic", {}).items()
            if self.engine_of_model(model) in (engine, None)
        )
        self._merge()

    def set_engine(self, engine: str, facts: EngineFacts) -> None:
        """Take facts about an engine. If it is not up, its versions keep their last views."""
        self._engines[engine] = facts
        if not facts.up:
            self._drop_report(engine)
        self._merge()

    def remove_engine(self, engine: str) -> None:
        """Forget an engine that is not replaced."""
        self._engines.pop(engine, None)
        self._drop_report(engine)
        self._merge()

    def _drop_report(self, engine: str) -> None:
        report = self._reports.pop(engine, None)
        if report is not None:
            self._orphans.update((job["id"], job) for job in report.get("jobs", ()))
            for job_id in list(self._orphans)[:-MOST_ORPHANS]:
                del self._orphans[job_id]

    def move(self, version: tuple[str, int], engine: str) -> None:
        """Show a version that no engine shows at the moment as one of `engine`."""
        self._moved[version] = engine
        self._merge()

    def fail(self, model: str, version: int, reason: str) -> None:
        """Show a version as failed, whatever an engine says of it."""
        self._failed[model, version] = reason
        self._merge()

    def allow(self, model: str, version: int | None) -> None:
        """Show a version that was failed as its engine shows it; None means all versions of the model."""
        for key in list(self._failed):
            if key[0] == model and version in (None, key[1]):
                del self._failed[key]
        self._merge()

    def news_for(self, web: str) -> tuple[JsonObject, dict[str, bytes]] | None:
        """The catalog, and the files that web process `web` lacks; None if it has the catalog already."""
        earlier = self._sent.get(web)
        if earlier == self._catalog:
            return None
        self._sent[web] = self._catalog
        wanted = file_digests(self._catalog, {} if earlier is None else earlier)
        return self._catalog, {digest: self._files[digest] for digest in wanted}

    def forget_web(self, web: str) -> None:
        """Forget what a web process has, because it has ended."""
        self._sent.pop(web, None)

    def _merge(self) -> None:
        merged = merge(self._catalog, self._reports, self._engines, self._failed, self._moved)
        for job in self._orphans.values():
            if job["state"] == "running":
                job |= _orphan_state(job, merged["models"].get(job["model"], {"versions": {}})["versions"])
        reported = [job for report in self._reports.values() for job in report.get("jobs", ())]
        merged["jobs"] = sorted(
            [*map(dict, self._orphans.values()), *reported], key=lambda job: job["created"]
        )
        self._catalog = merged
        # A report may count later, so its files are kept as well.
        used = {digest for each in (self._catalog, *self._reports.values()) for digest in file_digests(each)}
        self._files = {digest: content for digest, content in self._files.items() if digest in used}


def _orphan_state(job: JsonObject, versions: Mapping[str, Any]) -> JsonObject:
    """How a job ended whose engine has ended meanwhile: by what has become of its versions."""
    views = [versions.get(str(number), {"state": "unloaded"}) for number in job["versions"]]
    ended = {"phase": "", "ended": time.time()}
    if job["kind"] == "unload":
        gone = all(view["state"] in ("unloaded", "failed") for view in views)
        return {"state": "done", **ended} if gone else {}
    reasons = [view.get("reason") or "its engine has ended" for view in views
               if view["state"] in ("failed", "unloaded")]  # fmt: skip
    if reasons:
        return {"state": "failed", "reason": "; ".join(reasons), **ended}
    ready = all(view["state"] == "ready" and not view.get("reloading") for view in views)
    return {"state": "done", **ended} if ready else {}


def file_digests(catalog: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> list[str]:
    """The digests of the files of the codecs in `catalog`, without those codecs that `earlier` has."""
    known = set(_codecs(earlier or {}))
    digests: dict[str, None] = {}
    for key, codecs in _codecs(catalog).items():
        if key not in known:
            digests.update(dict.fromkeys(filter(None, (codecs["tokenizer"], codecs["names"]))))
    return list(digests)


def codecs_key(codecs: Mapping[str, Any]) -> str:
    """A text that is equal for equal sources of codecs."""
    return json.dumps(codecs, sort_keys=True)


def _codecs(catalog: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {codecs_key(view["codecs"]): view["codecs"] for view in _views(catalog) if view["codecs"]}


def _views(catalog: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    for model in catalog.get("models", {}).values():
        yield from model["versions"].values()
