"""How jobs follow the lifecycles of their versions, with a clock that the test sets."""

from __future__ import annotations

import pytest
from inferpool.errors import Conflict
from inferpool.pool.ports import VersionKey
from inferpool.repository.job_tracker import DRAIN, JobTracker
from inferpool.repository.jobs import CANCELLED, DONE, ELSEWHERE, JOB_FAILED, RUNNING, Job
from inferpool.repository.lifecycle import LOAD, QUEUED, VersionLifecycle

A1 = VersionKey("a", 1)


class Tracked:
    """A tracker of one version."""

    def __init__(self) -> None:
        self.now = 0.0
        self.elsewhere: set[VersionKey] = set()
        self.lifecycle = VersionLifecycle()
        self.jobs = JobTracker(
            {A1: self.lifecycle}, self.elsewhere.__contains__, lambda: self.now, lambda: self.now
        )

    def load(self) -> Job:
        """Want the version, and begin its load and a job for that."""
        self.lifecycle.want("source")
        self.lifecycle.load_begun()
        self.jobs.load_begun(A1)
        return self.jobs.begin("load", "a", 1, [1], None)

    def ended(self) -> Job:
        """The only job, which has ended just now."""
        assert self.jobs.is_any_due
        assert self.jobs.end_due()
        assert not self.jobs.is_any_due
        [job] = self.jobs.jobs()
        return job


def test_a_load_is_done_when_its_version_serves() -> None:
    tracked = Tracked()
    job = tracked.load()
    assert (job.state, job.phase) == (RUNNING, QUEUED)
    tracked.now = 2.0
    assert tracked.jobs.load_entered(A1, LOAD)
    assert not tracked.jobs.is_any_due
    [job] = tracked.jobs.jobs()
    assert (job.phase, job.phase_began) == (LOAD, 2.0)
    tracked.now = 5.0
    tracked.jobs.load_ended(A1, ok=True)
    tracked.lifecycle.loaded()
    assert tracked.ended().state == DONE
    again = tracked.jobs.begin("load", "a", 1, [1], None)
    assert again.expected == {LOAD: 3.0}


def test_a_load_fails_with_the_reason_of_its_version_and_elsewhere_it_has_none() -> None:
    tracked = Tracked()
    tracked.load()
    tracked.lifecycle.load_failed("no room")
    job = tracked.ended()
    assert (job.state, job.reason) == (JOB_FAILED, "no room")
    tracked = Tracked()
    tracked.load()
    tracked.lifecycle.load_failed("on another device")
    tracked.elsewhere.add(A1)
    assert tracked.ended().state == ELSEWHERE


def test_an_unload_is_done_when_the_last_request_is_answered() -> None:
    tracked = Tracked()
    tracked.lifecycle.want("source")
    tracked.lifecycle.load_begun()
    tracked.lifecycle.loaded()
    tracked.lifecycle.unwant()
    job = tracked.jobs.begin("unload", "a", 1, [1], None)
    tracked.lifecycle.drain_begun()
    assert tracked.jobs.end_due()
    assert [(job.state, job.phase) for job in tracked.jobs.jobs()] == [(RUNNING, DRAIN)]
    with pytest.raises(Conflict, match="is being unloaded already"):
        tracked.jobs.cancel(job.id)
    tracked.lifecycle.drained()
    assert tracked.ended().state == DONE


def test_a_cancelled_job_leaves_its_version_as_it_was_and_is_cancelled_once() -> None:
    tracked = Tracked()
    job = tracked.load()
    cancelled = tracked.jobs.cancel(job.id)
    assert cancelled is not None
    assert (cancelled.state, tracked.lifecycle.wanted) == (CANCELLED, None)
    with pytest.raises(Conflict, match="has ended: cancelled"):
        tracked.jobs.cancel(job.id)
    assert tracked.jobs.cancel("unknown") is None


def test_a_fetch_becomes_a_load_of_what_has_come_unless_it_was_cancelled() -> None:
    tracked = Tracked()
    job, is_new = tracked.jobs.begin_fetch("a", None, "s3://models/a", "key", 2)
    assert is_new
    assert tracked.jobs.tell_fetched(job.id, 5, 10)
    tracked.now = 4.0
    assert tracked.jobs.end_fetch(job.id, [1], "")
    [loading] = tracked.jobs.jobs()
    assert (loading.fetching, loading.versions, loading.fetch_s) == (False, (1,), 4.0)
    other, _ = tracked.jobs.begin_fetch("a", 2, "s3://models/a", "key", 2)
    tracked.jobs.cancel(other.id)
    assert not tracked.jobs.is_fetching(other.id)
    assert not tracked.jobs.end_fetch(other.id, [2], "")


def test_a_job_whose_version_serves_already_cannot_be_cancelled() -> None:
    """It still runs until all web processes know the version, which answers requests by then."""
    tracked = Tracked()
    job = tracked.load()
    tracked.lifecycle.loaded()
    assert tracked.jobs.is_any_due
    with pytest.raises(Conflict, match="is ready already; unload it"):
        tracked.jobs.cancel(job.id)
    assert tracked.lifecycle.wanted == "source"
    assert tracked.ended().state == DONE


def test_a_job_of_several_versions_says_which_one_has_failed() -> None:
    good, bad = VersionLifecycle(), VersionLifecycle()
    jobs = JobTracker({A1: good, VersionKey("a", 2): bad}, lambda key: False, lambda: 0.0, lambda: 0.0)
    for lifecycle in (good, bad):
        lifecycle.want("source")
        lifecycle.load_begun()
    jobs.begin("load", "a", None, [1, 2], None)
    good.loaded()
    bad.load_failed("no room")
    assert jobs.end_due()
    assert [(job.state, job.reason) for job in jobs.jobs()] == [(JOB_FAILED, "version 2: no room")]
