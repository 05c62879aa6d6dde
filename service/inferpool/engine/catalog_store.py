"""The catalogs that engines have shown, what became of engines and versions since, and who was sent what.

`catalog_merge` makes one catalog of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from inferpool.engine.catalog_merge import (
    EngineFacts,
    JsonObject,
    file_digests,
    merge,
    merge_jobs,
    orphan_state,
)

MOST_ORPHANS: Final = 100
"""How many jobs are remembered whose engines have ended."""


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
                job |= orphan_state(job, merged["models"].get(job["model"], {"versions": {}})["versions"])
        reported = merge_jobs(self._reports, merged["models"])
        # A job whose engine has ended may go on in others.
        orphans = [dict(job) for job in self._orphans.values() if job["id"] not in reported]
        merged["jobs"] = sorted([*orphans, *reported.values()], key=lambda job: job["created"])
        self._catalog = merged
        # A report may count later, so its files are kept as well.
        used = {digest for each in (self._catalog, *self._reports.values()) for digest in file_digests(each)}
        self._files = {digest: content for digest, content in self._files.items() if digest in used}
