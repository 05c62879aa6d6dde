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
            jobs[job_id] = job | orphan_state(job, models.get(job["model"], {"versions": {}})["versions"])
            continue
        running = [job for job in counted if job["state"] == "running"]
        ended = sorted(counted, key=lambda job: (job["state"] == "done", -job["ended"]))
        jobs[job_id] = {**(running or ended)[0]}
        if not running:
            jobs[job_id]["ended"] = max(job["ended"] for job in counted)
    return jobs


def orphan_state(job: JsonObject, versions: Mapping[str, Any]) -> JsonObject:
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
