"""How jobs go on and end: each one follows the lifecycles of its versions.

The caller sees to it that one thread at a time calls these methods; `jobs` and `is_fetching` alone may be
called in any thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from inferpool.errors import Conflict, Reason
from inferpool.pool.ports import VersionKey
from inferpool.repository.jobs import (
    CANCELLED,
    DONE,
    ELSEWHERE,
    JOB_FAILED,
    RUNNING,
    Job,
    JobKind,
    JobState,
    JobTable,
    LoadTimes,
)
from inferpool.repository.lifecycle import FAILED, FETCH, QUEUED, READY, UNLOADED, Phase, VersionLifecycle

log = logging.getLogger(__name__)

DRAIN: Final = "drain"
"""The phase of a job that waits until a version has answered its last request."""


class JobTracker:
    """The jobs, and how long loads have taken, by which the rest of a job is estimated."""

    def __init__(
        self,
        lifecycles: Mapping[VersionKey, VersionLifecycle],
        is_elsewhere: Callable[[VersionKey], bool],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        """`lifecycles` are those of all versions at each moment.

        `is_elsewhere` says whether the last load has left a version to the engine of another device.
        """
        self._lifecycles = lifecycles
        self._is_elsewhere = is_elsewhere
        self._clock = clock
        self._jobs = JobTable(wall_clock)
        self._times = LoadTimes()

    def jobs(self) -> list[Job]:
        """All jobs that run, and the last ones that have ended, oldest first."""
        return list(self._jobs)

    # What somebody asks for.

    def begin(
        self, kind: JobKind, model: str, asked: int | None, versions: Sequence[int], job_id: str | None
    ) -> Job:
        """A job for versions whose lifecycles the caller has changed; the same one if it runs already.

        `job_id` is the id of a new job; None makes one.
        """
        now = self._clock()
        job = self._jobs.begin(kind, model, asked, versions, now, self._times.expected(model), job_id)
        # The load may have begun, and entered a phase that takes long, before there was a job to show it.
        for number in versions:
            key = VersionKey(model, number)
            lifecycle = self._lifecycles.get(key)
            if lifecycle is not None and lifecycle.phase is not None and lifecycle.phase != job.phase:
                self._follow(key, lifecycle.phase, now)
        return self._jobs.get(job.id) or job

    def begin_fetch(
        self, model: str, asked: int | None, source: str, source_key: str, most: int
    ) -> tuple[Job, bool]:
        """A job for a version that the caller has yet to fetch, and whether it is new.

        Raises Conflict if `most` versions are being fetched already.
        """
        job, is_new = self._jobs.begin_fetch(model, asked, source, source_key, self._clock(), most)
        if is_new:
            job = self._jobs.update(job, expected=self._times.expected(model))
        return job, is_new

    def is_fetching(self, job_id: str) -> bool:
        """Whether a job waits for a fetch; False once it is cancelled."""
        return self._fetching(job_id) is not None

    def tell_fetched(self, job_id: str, fetched: int, to_fetch: int) -> bool:
        """Take note of how far a fetch is; returns whether a job waits for it."""
        job = self._fetching(job_id)
        if job is None:
            return False
        self._jobs.update(job, fetched=fetched, to_fetch=to_fetch)
        return True

    def end_fetch(self, job_id: str, versions: Sequence[int], reason: Reason) -> bool:
        """Let a job load `versions`, which the caller wants; or fail it with a `reason`.

        Returns whether the job has waited for that.
        """
        job = self._fetching(job_id)
        if job is None:
            return False
        now = self._clock()
        fetch_s = now - job.phase_began
        job = self._jobs.update(
            job, fetching=False, versions=tuple(versions), fetch_s=fetch_s, phase=QUEUED, phase_began=now,
            expected={**job.expected, FETCH: fetch_s} if job.expected else {},
        )  # fmt: skip
        if reason:
            log.error("%s: the version that was to be loaded from %s did not come: %s", job.model,
                      job.source, reason)  # fmt: skip
            self._jobs.end(job, JOB_FAILED, reason)
        for number in versions:
            key = VersionKey(job.model, number)
            lifecycle = self._lifecycles.get(key)
            if lifecycle is not None and lifecycle.phase is not None:
                self._follow(key, lifecycle.phase, now)
        return True

    def cancel(self, job_id: str) -> Job | None:
        """End a job that runs; its versions go on being what they are. None if there is no such job.

        Raises Conflict if the job has ended, if its versions serve already, or if one of them drains.
        """
        job = self._jobs.get(job_id)
        if job is None:
            return None
        if job.state != RUNNING:
            raise Conflict(f"job {job_id} has ended: {job.state}")
        known = self._lifecycles_of(job)
        if job.kind == "unload" and any(lifecycle.actual != READY for lifecycle in known):
            raise Conflict(f"job {job_id} cannot be cancelled: {job.model} is being unloaded already")
        if job.kind == "load" and self._outcome_of(job) == (DONE, ""):
            # The job only waits until all that send requests know that.
            raise Conflict(f"job {job_id} cannot be cancelled: what it loads is ready already; unload it")
        for lifecycle in known:
            if lifecycle.served is not None:
                lifecycle.want(lifecycle.served)
            else:
                lifecycle.unwant()
        return self._jobs.end(job, CANCELLED, "somebody has cancelled it")

    def _fetching(self, job_id: str) -> Job | None:
        """The job with this id if it waits for a fetch."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.fetching and job.state == RUNNING else None

    # What loads do.

    def load_begun(self, key: VersionKey) -> None:
        """Take note that the load of a version waits for its thread."""
        self._times.entered(key, QUEUED, self._clock())

    def load_entered(self, key: VersionKey, phase: Phase) -> bool:
        """Take note that a load has entered a phase; returns whether any job has changed."""
        now = self._clock()
        self._times.entered(key, phase, now)
        return self._follow(key, phase, now)

    def load_ended(self, key: VersionKey, *, ok: bool) -> None:
        """Take note that a load has ended. Estimates are by loads that end well."""
        self._times.ended(key, self._clock(), ok=ok)

    def _follow(self, key: VersionKey, phase: str, now: float) -> bool:
        """Let the jobs that are about a version show its phase; returns whether there are any."""
        about = [
            job for job in self._jobs.running()
            if job.kind == "load" and job.model == key.model and key.version in job.versions
        ]  # fmt: skip
        for job in about:
            expected = self._times.expected(job.model)
            if expected and job.fetch_s:
                expected = {**expected, FETCH: job.fetch_s}
            self._jobs.update(job, phase=phase, phase_began=now, expected=expected)
        return bool(about)

    # The ends of jobs.

    @property
    def is_any_due(self) -> bool:
        """Whether `end_due` would end a job now."""
        return any(self._outcome_of(job) is not None for job in self._jobs.running())

    def end_due(self) -> bool:
        """End the jobs whose versions are through; returns whether any job has changed."""
        changed = False
        for job in self._jobs.running():
            ended = self._outcome_of(job)
            if ended is not None:
                self._jobs.end(job, *ended)
                changed = True
            elif job.kind == "load":
                through = sum(lifecycle.settled for lifecycle in self._lifecycles_of(job))
                if through != job.loaded:
                    self._jobs.update(job, loaded=through)
                    changed = True
            elif job.phase != DRAIN:
                self._jobs.update(job, phase=DRAIN, phase_began=self._clock())
                changed = True
        return changed

    def _lifecycles_of(self, job: Job) -> list[VersionLifecycle]:
        """The lifecycles of a job's versions that are known."""
        found = [self._lifecycles.get(VersionKey(job.model, number)) for number in job.versions]
        return [lifecycle for lifecycle in found if lifecycle is not None]

    def _outcome_of(self, job: Job) -> tuple[JobState, Reason] | None:
        """How a job has ended; None if it runs on."""
        if job.fetching:
            return None
        lifecycles = self._lifecycles_of(job)
        if job.kind == "unload":
            if any(lifecycle.wanted is not None for lifecycle in lifecycles):
                return CANCELLED, "a later request wants the version"
            gone = all(
                lifecycle.actual in (UNLOADED, FAILED) and lifecycle.loading is None
                for lifecycle in lifecycles
            )
            return (DONE, "") if gone else None
        if job.versions and all(self._is_elsewhere(VersionKey(job.model, number)) for number in job.versions):
            return ELSEWHERE, ""
        if any(lifecycle.wanted is None for lifecycle in lifecycles) or not lifecycles:
            return CANCELLED, "the version is no longer wanted"
        if not all(lifecycle.settled for lifecycle in lifecycles):
            return None
        keys = [VersionKey(job.model, number) for number in job.versions]
        here = {key.version: self._lifecycles.get(key) for key in keys if not self._is_elsewhere(key)}
        failed = {
            number: lifecycle.reason
            for number, lifecycle in here.items()
            if lifecycle is not None and not lifecycle.succeeded
        }
        named = len(job.versions) > 1
        reasons = [f"version {number}: {why}" if named else why for number, why in failed.items() if why]
        return (JOB_FAILED, "; ".join(reasons)) if failed else (DONE, "")
