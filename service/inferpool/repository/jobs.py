"""Jobs: the loads and unloads that somebody has asked for, how far they are, and how they ended."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from inferpool.errors import Conflict, Reason
from inferpool.pool.ports import VersionKey
from inferpool.repository.lifecycle import FETCH, PHASES, QUEUED, VERIFY, Phase

JobKind: TypeAlias = Literal["load", "unload"]
JobState: TypeAlias = Literal["running", "done", "failed", "cancelled", "elsewhere"]

RUNNING: Final[JobState] = "running"
DONE: Final[JobState] = "done"
JOB_FAILED: Final[JobState] = "failed"
CANCELLED: Final[JobState] = "cancelled"
ELSEWHERE: Final[JobState] = "elsewhere"
"""The versions run on another device, whose engine has a job of the same id. Clients never see this state."""

MOST_JOBS: Final = 100
"""How many jobs that have ended are kept; the oldest is forgotten first."""


@dataclass(frozen=True, slots=True)
class Job:
    """A load or an unload that somebody has asked for.

    Attributes:
        id: names the job in `/jobs/{id}`.
        kind: `load` or `unload`.
        model: the name of the model.
        asked: the version that the request named; None for all that `model.toml` serves.
        versions: the versions that the job is about.
        state: `running`, `done`, `failed` or `cancelled`.
        phase: what is done at the moment; empty once the job has ended.
        phase_began: when the phase began, by the monotonic clock of the machine.
        expected: the seconds that each phase took when the model was loaded last; empty if it never was.
        loaded: how many of the versions are through.
        reason: why the job failed; empty if it did not.
        created: when the job was asked for, in seconds since 1970.
        ended: when it ended; 0 while it runs.
        source: where the version comes from, without credentials; empty if the models folder has it.
        source_key: tells sources apart whose texts without credentials are the same.
        fetching: whether the version is still being fetched; `versions` is empty until then.
        fetched: the bytes that have arrived.
        to_fetch: the bytes that are expected; 0 if that is not known.
        fetch_s: how long the fetch took.
    """

    id: str
    kind: JobKind
    model: str
    asked: int | None
    versions: tuple[int, ...]
    state: JobState = RUNNING
    phase: str = QUEUED
    phase_began: float = 0.0
    expected: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    loaded: int = 0
    reason: Reason = ""
    created: float = 0.0
    ended: float = 0.0
    source: str = ""
    source_key: str = ""
    fetching: bool = False
    fetched: int = 0
    to_fetch: int = 0
    fetch_s: float = 0.0

    def progress(self, now: float) -> tuple[float, float | None]:
        """The share that is done, from 0 to 1, and the seconds left, None if unknown, at `now`.

        The estimate is by what the last load of the model took, phase by phase. It never reaches 1, and the
        seconds never 0, before the job has ended.
        """
        if self.state != RUNNING:
            return 1.0 if self.state == DONE else 0.0, 0.0
        total = sum(self.expected.values())
        if self.fetching:
            return self._fetch_progress(now, total)
        if self.phase not in PHASES or self.kind == "unload":
            return 0.0, None
        at = PHASES.index(self.phase)
        if not total:
            share, left_s = at / len(PHASES), None
        else:
            done_s = sum(self.expected.get(phase, 0.0) for phase in PHASES[:at])
            done_s += min(max(0.0, now - self.phase_began), self.expected.get(self.phase, 0.0))
            share = done_s / total
            left_s = max(0.1, (total - done_s) + total * (len(self.versions) - self.loaded - 1))
        return min(0.99, (self.loaded + share) / max(1, len(self.versions))), left_s

    def _fetch_progress(self, now: float, rest_s: float) -> tuple[float, float | None]:
        """The share and the seconds left while the version is fetched, by the rate of the bytes so far."""
        share = min(1.0, self.fetched / self.to_fetch) if self.to_fetch else 0.0
        elapsed_s = max(0.0, now - self.phase_began)
        if not share or not elapsed_s:
            return 0.0, None
        left_s = elapsed_s * (1 - share) / share + rest_s
        if not rest_s:  # what follows the fetch is not known
            return share * PHASES.index(VERIFY) / len(PHASES), None if share == 1 else left_s
        return min(0.99, elapsed_s / (elapsed_s + left_s)), max(0.1, left_s)

    def to_json(self) -> dict[str, Any]:
        """The job as JSON values."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "versions": list(self.versions), "expected": dict(self.expected)}

    @classmethod
    def from_json(cls, sent: Mapping[str, Any]) -> Job:
        """The job that `to_json` wrote."""
        return cls(**{**sent, "versions": tuple(sent["versions"])})


class LoadTimes:
    """How long each phase of the last load of each model took, in seconds."""

    def __init__(self) -> None:
        self._of_model: dict[str, dict[str, float]] = {}
        self._under_way: dict[VersionKey, dict[str, float]] = {}
        self._phase: dict[VersionKey, tuple[Phase, float]] = {}

    def entered(self, key: VersionKey, phase: Phase, now: float) -> None:
        """Take note that the load of a version has entered a phase."""
        self._close(key, now)
        self._phase[key] = (phase, now)

    def ended(self, key: VersionKey, now: float, *, ok: bool) -> None:
        """Take note that a load has ended. Only loads that end well count."""
        self._close(key, now)
        times = self._under_way.pop(key, {})
        if ok:
            times.pop(QUEUED, None)
            self._of_model[key.model] = times

    def expected(self, model: str) -> Mapping[str, float]:
        """The seconds of each phase of the model's last load; empty if there was none."""
        return MappingProxyType(self._of_model.get(model, {}))

    def _close(self, key: VersionKey, now: float) -> None:
        phase = self._phase.pop(key, None)
        if phase is not None:
            times = self._under_way.setdefault(key, {})
            times[phase[0]] = times.get(phase[0], 0.0) + now - phase[1]


class JobTable:
    """All jobs that run, and the last ones that have ended.

    One thread at a time may change them. Any thread may iterate over them meanwhile.
    """

    def __init__(self, wall_clock: Callable[[], float], most: int = MOST_JOBS) -> None:
        self._wall_clock = wall_clock
        self._most = most
        self._jobs: dict[str, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        """Iterate over the jobs, oldest first."""
        return iter(list(self._jobs.values()))

    def get(self, job_id: str) -> Job | None:
        """The job with this id; None if there is none, or if it is forgotten."""
        return self._jobs.get(job_id)

    def running(self) -> list[Job]:
        """The jobs that have not ended, oldest first."""
        return [job for job in self._jobs.values() if job.state == RUNNING]

    def begin(
        self,
        kind: JobKind,
        model: str,
        asked: int | None,
        versions: Sequence[int],
        now: float,
        expected: Mapping[str, float],
        job_id: str | None = None,
    ) -> Job:
        """A new job, whose id may be given, or the one that runs for the same request already."""
        wanted = (kind, model, asked, tuple(versions), False)
        for job in self.running():
            if (job.kind, job.model, job.asked, job.versions, job.fetching) == wanted:
                return job
        job = Job(
            job_id or secrets.token_hex(6), kind, model, asked, tuple(versions),
            phase=QUEUED if kind == "load" else "", phase_began=now, expected=expected,
            created=self._wall_clock(),
        )  # fmt: skip
        self._jobs[job.id] = job
        self._forget()
        return job

    def begin_fetch(
        self, model: str, asked: int | None, source: str, source_key: str, now: float, most: int
    ) -> tuple[Job, bool]:
        """A job for a version that has yet to be fetched, and True; or the one that runs already.

        Raises Conflict if `most` versions are being fetched already.
        """
        running = self.running()
        for job in running:
            if (job.model, job.asked, job.source_key) == (model, asked, source_key):
                return job, False
        if sum(job.fetching for job in running) >= most:
            raise Conflict(f"{most} versions are being fetched already; wait for one, or cancel it")
        job = Job(
            secrets.token_hex(6), "load", model, asked, (), phase=FETCH, phase_began=now,
            created=self._wall_clock(), source=source, source_key=source_key, fetching=True,
        )  # fmt: skip
        self._jobs[job.id] = job
        self._forget()
        return job, True

    def update(self, job: Job, **changes: Any) -> Job:
        """Replace a job by one with `changes`."""
        changed = self._jobs[job.id] = replace(job, **changes)
        return changed

    def end(self, job: Job, state: JobState, reason: Reason = "") -> Job:
        """Take note of the end of a job."""
        ended = self.update(job, state=state, reason=reason, phase="", ended=self._wall_clock())
        self._forget()
        return ended

    def _forget(self) -> None:
        over = [job.id for job in self._jobs.values() if job.state != RUNNING]
        for job_id in over[: max(0, len(over) - self._most)]:
            del self._jobs[job_id]
