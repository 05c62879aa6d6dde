"""Merges the catalogs of several engines into the one that web processes have. Plain JSON values only.

An engine shows the versions that it has taken. A version is shown by each engine that has it: one for each
device of its instances. A version that no engine shows at the moment keeps its last view, because its engine
is being restarted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

JsonObject: TypeAlias = dict[str, Any]

MOST_ORPHANS: Final = 100
"""How many jobs are remembered whose engines have ended."""
_RANKS: Final = {"ready": 0, "loading": 1, "draining": 2, "failed": 3, "unloaded": 4}
"""If several engines show a version, the one counts that can answer, or is about to."""
ELSEWHERE: Final = "elsewhere"
"""The state of a job in an engine whose device the versions do not run on; no web process sees it."""


class EngineFacts(NamedTuple):
    """The facts that the supervisor knows about an engine.

    Attributes:
        pid: the id of its process; 0 while there is none.
        restarts: how many engines this one has replaced.
        up: whether its process lives and its control connection is open.
        parent: the engine that it has taken its only version from; None for the engine of a device.
    """

    pid: int
    restarts: int
    up: bool
    parent: str | None = None


def merge(
    earlier: Mapping[str, Any],
    reports: Mapping[str, Mapping[str, Any]],
    engines: Mapping[str, EngineFacts],
    failed: Mapping[tuple[str, int], Mapping[str, str]],
    moved: Mapping[tuple[str, int], Mapping[str, str]] = {},
) -> JsonObject:
    """The catalog of the whole server.

    Args:
        earlier: what this function returned last; empty at first.
        reports: the catalog of each engine, by the engine's name.
        engines: the facts about each engine, the oldest first, which decides about labels.
        failed: the versions that the supervisor has failed, with the reason by engine.
        moved: the engines of versions that are no more where they were, by the engine where they were.

    Each version gets these keys:
        engine: the engine that has it or had it last; None if the version has failed for good.
        engines: all engines that have it ready, or had when they were restarted.
        absent: those of `engines` that cannot answer at the moment.
        faults: why other engines that should have it cannot, by name.
        reloading: whether it was ready before, and all of `engines` are absent. Requests for such a version
            wait, so its state stays `ready`.
    """
    models: dict[str, JsonObject] = {}
    order = {name: number for number, name in enumerate(engines)}
    ordered = sorted(reports, key=lambda name: order.get(name, len(order)))
    # The engine that comes first decides about labels.
    for source in (earlier.get("models", {}), *(reports[engine]["models"] for engine in reversed(ordered))):
        for name, model in source.items():
            merged = models.setdefault(name, {**model, "versions": {}})
            merged.update({key: value for key, value in model.items() if key != "versions"})
    removed = {
        (name, int(number)) for report in reports.values() for name, number in report.get("removed", ())
    }
    for name, model in models.items():
        before = earlier.get("models", {}).get(name, {}).get("versions", {})
        shown = {
            engine: reports[engine]["models"][name]["versions"]
            for engine in ordered
            if name in reports[engine]["models"]
        }
        kept = {number for number in before if (name, int(number)) not in removed}
        numbers = {*kept, *(number for versions in shown.values() for number in versions)}
        model["versions"] = {
            number: _version(
                before.get(number),
                {engine: versions[number] for engine, versions in shown.items() if number in versions},
                reports,
                engines,
                failed.get((name, int(number)), {}),
                moved.get((name, int(number)), {}),
            )
            for number in sorted(numbers, key=int)
        }
        for number, view in model["versions"].items():
            view["labels"] = [label for label, named in model["labels"].items() if named == int(number)]
    models = {name: model for name, model in models.items() if model["versions"]}
    return {"models": models, "engines": {name: facts._asdict() for name, facts in engines.items()}}


def _version(
    before: Mapping[str, Any] | None,
    shown: Mapping[str, Mapping[str, Any]],
    reports: Mapping[str, Any],
    engines: Mapping[str, EngineFacts],
    failures: Mapping[str, str],
    moved: Mapping[str, str],
) -> JsonObject:
    """One version: as it was before, and as each engine shows it."""
    good = {name: view for name, view in shown.items() if name not in failures}
    had = [] if before is None else [moved.get(name, name) for name in before["engines"] if name not in good]
    had += [] if before is None else [name for name in before["engines"] if name in good]
    ready = [name for name in good if good[name]["state"] == "ready"]
    up = [name for name in ready if name in engines and engines[name].up]
    absent = [name for name in ready if name not in up]
    absent += [name for name in good if good[name]["state"] == "loading" and name in had]
    absent += [
        name for name in dict.fromkeys(had)
        if name not in shown and name not in reports and name not in failures
        and (name in engines or name in moved.values())
    ]  # fmt: skip
    # A version that gets an engine of its own is in two for a while, and answers in the new one.
    parents = {engines[name].parent for name in (*up, *absent) if name in engines}
    up = [name for name in up if name not in parents]
    absent = [name for name in absent if name not in parents]
    best = min(good, key=lambda name: (_RANKS[good[name]["state"]], name in parents), default=None)
    was_ready = before is not None and before["state"] == "ready"
    if failures and not up and not absent and not any(view["state"] == "loading" for view in good.values()):
        reason = next(iter(failures.values()))
        last = {} if before is None else before
        view = {**last, **next(iter(shown.values()), {}), "state": "failed", "reason": reason, "engine": None}
        return view | {"engines": [], "absent": [], "faults": {}, "reloading": False}
    if up:
        view = {**good[up[0]], "engine": up[0]}
    elif best is None:
        assert before is not None  # a version is known from one of the two
        last_engine = before["engine"]
        view = {**before, "engine": absent[0] if absent else moved.get(last_engine, last_engine)}
        if before["state"] == "draining":
            # Its engine ended meanwhile, and the successor does not load the version again.
            view |= {"state": "unloaded", "reason": "it was unloaded"}
    else:
        view = {**good[best], "engine": best}
        if before is not None and was_ready and (view["state"] == "loading" or absent):
            engine = best if view["state"] in ("ready", "loading") else absent[0]
            view = {**before, "labels": view["labels"], "engine": engine}
    if before is not None and before.get("beside"):
        view["beside"] = True  # if its load ends an engine, the server is ready all the same
    is_ready = view["state"] == "ready"
    if is_ready and not up and not absent:
        absent = [view["engine"]]
    faults = {name: view["reason"] for name, view in good.items() if view["state"] == "failed"}
    view["engines"] = [*up, *absent] if is_ready else []
    view["absent"] = absent if is_ready else []
    view["faults"] = {**faults, **failures} if is_ready else {}
    view["reloading"] = is_ready and not up
    return view


def merge_jobs(
    reports: Mapping[str, Mapping[str, Any]], models: Mapping[str, JsonObject]
) -> dict[str, JsonObject]:
    """The jobs of all engines by id. Engines that do the same have jobs of one id, which become one.

    Such a job runs until it has ended in each engine, and has failed if it has in any. An engine whose device
    the versions do not run on does not count.
    """
    found: dict[str, list[JsonObject]] = {}
    for report in reports.values():
        for job in report.get("jobs", ()):
            found.setdefault(job["id"], []).append(job)
    jobs: dict[str, JsonObject] = {}
    for job_id, parts in found.items():
        counted = [job for job in parts if job["state"] != ELSEWHERE]
        if not counted:
            # The engine that takes the versions has no part in the job: their states tell how it ends.
            job = {**parts[0], "state": "running"}
            jobs[job_id] = job | _orphan_state(job, models.get(job["model"], {"versions": {}})["versions"])
            continue
        running = [job for job in counted if job["state"] == "running"]
        ended = sorted(counted, key=lambda job: (job["state"] == "done", -job["ended"]))
        jobs[job_id] = {**(running or ended)[0]}
        if not running:
            jobs[job_id]["ended"] = max(job["ended"] for job in counted)
    return jobs


class CatalogStore:
    """The catalogs of all engines, and the part of them that each web process has."""

    def __init__(self) -> None:
        self._reports: dict[str, Mapping[str, Any]] = {}
        self._engines: dict[str, EngineFacts] = {}
        self._failed: dict[tuple[str, int], dict[str, str]] = {}
        self._moved: dict[tuple[str, int], dict[str, str]] = {}
        self._files: dict[str, bytes] = {}
        self._plans: dict[str, Mapping[str, str]] = {}
        self._held: dict[tuple[str, int], JsonObject] = {}
        self._sent: dict[str, JsonObject] = {}
        self._moves: dict[str, Any] = {}
        self._traffic: dict[str, Any] = {}
        self._orphans: dict[str, JsonObject] = {}
        # The versions that engines had which have ended.
        self._had: dict[str, set[tuple[str, int]]] = {}
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

    def engines_of_job(self, job_id: str) -> list[str]:
        """The engines that have a job; none if nobody has."""
        return [
            engine
            for engine, report in self._reports.items()
            if any(job["id"] == job_id for job in report.get("jobs", ()))
        ]

    def engine_of_model(self, model: str) -> str | None:
        """The engine that decides about a model: the oldest one that shows it. None if no engine does."""
        shows = (name for name in self._engines if name in self._reports)
        return next((name for name in shows if model in self._reports[name]["models"]), None)

    def engines_showing(self, model: str, version: int | None) -> list[str]:
        """The engines that show a version, or any of the model."""
        shown = {name: report["models"].get(model) for name, report in self._reports.items()}
        return [
            name for name, found in shown.items()
            if found is not None and (version is None or str(version) in found["versions"])
        ]  # fmt: skip

    def engines_starting(self, model: str, version: int | None) -> list[str]:
        """The engines that have yet to show what they load, and may load a version, or any of the model."""
        may_load = {name: self._had.get(name) for name in self._engines if name not in self._reports}
        return [
            name for name, had in may_load.items()
            if had is None or any(key[0] == model and version in (None, key[1]) for key in had)
        ]  # fmt: skip

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

    def versions_for(self, engine: str) -> list[tuple[str, int]]:
        """The versions that the successor of an engine has to load, as model names and numbers.

        These are those that it had, loaded, or could not load; all if it has ended before it told anything.
        """
        had = self._had.get(engine)
        there = self.versions("ready", "loading", "failed")
        return there if had is None else [version for version in there if version in had]

    def leave_out(self, engine: str, model: str, version: int | None) -> None:
        """Let the successor of an engine that has ended load a version, or all of a model, no more."""
        self._had[engine] = {
            key for key in self.versions_for(engine) if key[0] != model or version not in (None, key[1])
        }

    def take(self, engine: str, catalog: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Take the catalog of an engine in place of its last one, with the files that are new."""
        self._reports[engine] = catalog
        self._files.update(files)
        self._plans[engine] = catalog.get("plans", {})
        self._held.update(((model, number), source) for model, number, source in catalog.get("held", ()))
        # Other engines that show a model have what they were told last, which may be old.
        for decided, told in ((self._moves, "moves"), (self._traffic, "traffic")):
            for model, decision in catalog.get(told, {}).items():
                if self.engine_of_model(model) in (engine, None):
                    decided[model] = decision
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
        self._had.pop(engine, None)
        self._merge()

    def _drop_report(self, engine: str) -> None:
        report = self._reports.pop(engine, None)
        if report is not None:
            self._had[engine] = {
                (name, int(number))
                for name, model in report["models"].items()
                for number, view in model["versions"].items()
                if view["state"] in ("ready", "loading", "failed")
            }
            self._orphans.update((job["id"], job) for job in report.get("jobs", ()))
            for job_id in list(self._orphans)[:-MOST_ORPHANS]:
                del self._orphans[job_id]

    def move(self, version: tuple[str, int], parent: str, engine: str) -> None:
        """Show a version that `parent` had, and does not show at the moment, as one of `engine`."""
        self._moved.setdefault(version, {})[parent] = engine
        self._merge()

    def fail(self, version: tuple[str, int], reason: str, *engines: str) -> None:
        """Show a version as failed in `engines`, whatever they say of it."""
        self._failed.setdefault(version, {}).update(dict.fromkeys(engines, reason))
        self._merge()

    def allow(self, model: str, version: int | None) -> None:
        """Show a version that was failed as its engine shows it; None means all versions of the model."""
        for key in list(self._failed):
            if key[0] == model and version in (None, key[1]):
                del self._failed[key]
                there = self._moved.get(key, {}).items()
                self._moved[key] = {parent: own for parent, own in there if own in self._engines}
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
        reported = merge_jobs(self._reports, merged["models"])
        # A job whose engine has ended may go on in others.
        orphans = [dict(job) for job in self._orphans.values() if job["id"] not in reported]
        merged["jobs"] = sorted([*orphans, *reported.values()], key=lambda job: job["created"])
        self._catalog = merged
        # A report may count later, so its files are kept as well.
        used = {digest for each in (self._catalog, *self._reports.values()) for digest in file_digests(each)}
        self._files = {digest: content for digest, content in self._files.items() if digest in used}


def _orphan_state(job: JsonObject, versions: Mapping[str, Any]) -> JsonObject:
    """How a job ended whose engine has ended meanwhile: by what has become of its versions."""
    if job.get("fetching"):
        reason = "the engine that fetched the version has ended; load it again"
        return {"state": "failed", "reason": reason, "phase": "", "ended": time.time(), "fetching": False}
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
