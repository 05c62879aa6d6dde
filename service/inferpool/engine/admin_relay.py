"""Passes what administrators ask of web processes on to engines, and the answers back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from inferpool.engine.catalog_store import CatalogStore
from inferpool.engine.supervised import SupervisedEngine
from inferpool.error_fields import error_fields
from inferpool.errors import NotReady

NOT_UP: Final = "the engine of the model is being started or ended; try again later"
ENDED: Final = "the engine ended before it answered; see /models, and try again"
ALL_ENGINES: Final = ("load", "unload", "cancel")
"""What each engine of a version does for itself; the oldest engine of a model decides about all else."""
MOST_FETCHED: Final = 1000
"""How many jobs are remembered that have fetched a version; an engine shows at most 100 that have ended."""


class _Question:
    """A question that engines have not all answered.

    Attributes:
        values: what is asked.
        waits_for: the engines that have yet to answer.
        ended: the engines that have ended before they answered.
    """

    def __init__(self, values: Mapping[str, Any], waits_for: list[str]) -> None:
        self.values = values
        self.waits_for = waits_for
        self.ended: list[str] = []
        self.answers: list[Mapping[str, Any]] = []


class AdminRelay:
    """The questions that are not answered, by the web process and its number of the question."""

    def __init__(
        self,
        store: CatalogStore,
        engines: Mapping[str, SupervisedEngine],
        answer: Callable[[int, Mapping[str, Any]], None],
        loads: Callable[[str, int | None], None],
    ) -> None:
        """`engines` are those of the server at each moment, the first one first.

        `answer` sends an answer to the web process of a number. `loads` is told before an administrator loads
        a version, or all of a model.
        """
        self._store = store
        self._engines = engines
        self._answer = answer
        self._loads = loads
        self._questions: dict[tuple[int, int], _Question] = {}
        # The jobs whose fetched versions all engines know, oldest first.
        self._fetched: dict[str, None] = {}

    def ask(self, web: int, values: Mapping[str, Any], *, draining: bool) -> None:
        """Pass a question on to all engines that it is about; none gets it unless all can."""
        engines = [self._engines[name] for name in self._targets(values)]
        if draining or not engines or any(engine.child is None or not engine.told for engine in engines):
            self._answer(web, {"id": values["id"], "error": error_fields(NotReady(NOT_UP))})
            return
        if values["action"] == "load":
            self._loads(values["model"], values["version"])
        if values["action"] in ("load", "unload"):
            values = {**values, "job_id": secrets.token_hex(6)}  # the jobs of all engines are one job
        self._questions[web, values["id"]] = _Question(values, [engine.name for engine in engines])
        for engine in engines:
            assert engine.child is not None  # as seen above
            engine.child.control.send("admin", {**values, "web": web}, wait=False)

    def take_answer(self, engine: str, values: Mapping[str, Any]) -> None:
        """Take the answer of an engine. A question of an earlier web process has no answer."""
        key = (values["web"], values["id"])
        question = self._questions.get(key)
        if question is None or engine not in question.waits_for:
            return
        question.waits_for.remove(engine)
        question.answers.append(values)
        if not question.waits_for:
            del self._questions[key]
            # An engine that is about to take a version, or to lose it, may not know it.
            good = [answer for answer in question.answers if "error" not in answer]
            if good and question.values["action"] == "unload":
                for name in question.ended:
                    self._unload_in_successor(name, question.values)
            self._answer(values["web"], (good or question.answers)[0])

    def _unload_in_successor(self, name: str, values: Mapping[str, Any]) -> None:
        """Let no successor of an engine load what other engines unload."""
        engine = self._engines.get(name)
        if engine is None:
            return
        if engine.child is not None and engine.told:
            engine.child.control.send("admin", {**values, "web": 0, "id": 0}, wait=False)
        else:
            self._store.leave_out(name, values["model"], values["version"])

    def engine_ended(self, engine: str) -> None:
        """Answer what was asked of an engine that has ended; its successor may have been started."""
        for (web, number), question in list(self._questions.items()):
            if engine in question.waits_for:
                question.ended.append(engine)
                refusal = {"web": web, "id": number, "error": error_fields(NotReady(ENDED))}
                self.take_answer(engine, refusal)

    def web_ended(self, web: int) -> None:
        """Forget the questions of a web process: its successor gives their numbers to others."""
        for key in [key for key in self._questions if key[0] == web]:
            del self._questions[key]

    def take_jobs(self, engine: str, jobs: Iterable[Mapping[str, Any]]) -> None:
        """Let all engines load what one has fetched, as a part of the same job."""
        for job in jobs:
            if not job.get("source") or job["fetching"] or not job["versions"] or job["id"] in self._fetched:
                continue
            self._fetched[job["id"]] = None
            for version in job["versions"]:
                load = {"action": "load", "model": job["model"], "version": version, "source": None,
                        "job_id": job["id"], "web": 0, "id": 0}  # fmt: skip
                for name in self._loaders(job["model"], version):
                    child = self._engines[name].child
                    if name != engine and child is not None and self._engines[name].told:
                        child.control.send("admin", load, wait=False)
        while len(self._fetched) > MOST_FETCHED:
            del self._fetched[next(iter(self._fetched))]

    def _loaders(self, model: str, version: int | None) -> list[str]:
        """The engines that may load a version: that of each device, or the one that took the version."""
        found = [
            name for name, engine in self._engines.items()
            if engine.parent is None or (model, version) in (engine.only or ())
        ]  # fmt: skip
        parents = {self._engines[name].parent for name in found}
        return [name for name in found if name not in parents]

    def _targets(self, values: Mapping[str, Any]) -> list[str]:
        """The engines that are to do something; the first one answers for a model that no engine has."""
        action, model, version = values["action"], values.get("model", ""), values.get("version")
        if action == "cancel":
            found = self._store.engines_of_job(values["job"])
        elif action == "load" and values.get("source") is None:
            found = self._loaders(model, version)
        elif action == "load":
            found = []  # the first engine fetches it; see `take_jobs`
        elif action == "unload":
            # An engine that is being started would load the version, unless it is told, too.
            found = [*self._store.engines_showing(model, version), *self._starting(model, version)]
        else:
            found = self._deciders(model)
        found = [name for name in found if name in self._engines]
        return found or ([] if action == "cancel" else [next(iter(self._engines))])

    def _deciders(self, model: str) -> list[str]:
        """The engine that decides about a model: the oldest one that shows it, or is about to."""
        starting = self._starting(model, None)
        told = [name for name in starting if self._engines[name].told]
        found = {*self._store.engines_showing(model, None), *told} or {*starting}
        return [name for name in self._engines if name in found][:1]

    def _starting(self, model: str, version: int | None) -> list[str]:
        """The engines that have yet to show what they load, and may load a version, or any of a model."""
        return [
            name for name in self._store.engines_starting(model, version)
            if name in self._engines and _may_take(self._engines[name], model, version)
        ]  # fmt: skip


def _may_take(engine: SupervisedEngine, model: str, version: int | None) -> bool:
    """Whether an engine takes a version, or any of a model, if it is in the folder."""
    if engine.only is not None:
        return any(name == model and version in (None, number) for name, number in engine.only)
    return (model, version) not in engine.skip
