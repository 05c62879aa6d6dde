"""Jobs: one for the same request, a bounded number, and an honest estimate."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import Conflict
from inferpool.pool.ports import VersionKey
from inferpool.repository.jobs import DONE, JOB_FAILED, RUNNING, Job, JobTable, LoadTimes
from inferpool.repository.lifecycle import LOAD, MEASURE, PHASES, QUEUED, VERIFY

A1 = VersionKey("a", 1)


def table(most: int = 3) -> JobTable:
    return JobTable(lambda: 1000.0, most)


def test_the_same_request_twice_is_one_job_while_it_runs() -> None:
    jobs = table()
    first = jobs.begin("load", "a", 1, [1], 0, {})
    assert jobs.begin("load", "a", 1, [1], 5, {}) is first
    assert jobs.begin("unload", "a", 1, [1], 5, {}) is not first
    jobs.end(first, DONE)
    assert jobs.begin("load", "a", 1, [1], 6, {}).id != first.id


def test_a_bounded_number_of_jobs_is_kept_and_none_that_runs_is_forgotten() -> None:
    jobs = table(most=3)
    running = jobs.begin("load", "a", 1, [1], 0, {})
    for number in range(10):
        jobs.end(jobs.begin("load", "b", number, [number], 0, {}), JOB_FAILED, "bad")
    kept = list(jobs)
    assert len(kept) == 4
    assert jobs.get(running.id) is running
    assert [job.asked for job in kept if job.state != RUNNING] == [7, 8, 9]


def test_the_estimate_follows_the_last_load() -> None:
    times = LoadTimes()
    for phase, now in ((QUEUED, 0.0), (VERIFY, 5.0), (LOAD, 6.0), (MEASURE, 9.0)):
        times.entered(A1, phase, now)
    times.ended(A1, 15.0, ok=True)
    assert times.expected("a") == {VERIFY: 1.0, LOAD: 3.0, MEASURE: 6.0}
    job = Job("x", "load", "a", 1, (1,), phase=LOAD, phase_began=100.0, expected=times.expected("a"))
    assert job.progress(101.5) == pytest.approx((0.25, 7.5))
    # A phase that takes longer than the last time counts no more than that.
    assert job.progress(200.0) == pytest.approx((0.4, 6.0))


def test_a_load_that_failed_is_no_estimate() -> None:
    times = LoadTimes()
    times.entered(A1, LOAD, 0.0)
    times.ended(A1, 50.0, ok=False)
    assert not times.expected("a")
    assert Job("x", "load", "a", 1, (1,), phase=LOAD).progress(1.0)[1] is None


@given(
    st.sampled_from(PHASES),
    st.floats(-10, 1e6),
    st.dictionaries(st.sampled_from(PHASES), st.floats(0, 1e4)),
    st.integers(0, 3),
)
def test_no_job_that_runs_is_said_to_be_done(
    phase: str, now: float, expected: dict[str, float], loaded: int
) -> None:
    job = Job("x", "load", "a", None, (1, 2, 3, 4), phase=phase, expected=expected, loaded=loaded)
    share, left_s = job.progress(now)
    assert 0 <= share < 1
    assert left_s is None or left_s > 0


def test_a_job_crosses_processes_unchanged() -> None:
    job = Job("x", "load", "a", None, (1, 2), phase=LOAD, phase_began=1.5, expected={LOAD: 2.0}, created=3.0)
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_a_fetch_goes_by_its_bytes_and_what_follows_by_the_last_load() -> None:
    jobs = JobTable(lambda: 0.0)
    job, is_new = jobs.begin_fetch("m", None, "s3://b/m", "key", 100.0, 2)
    assert is_new
    assert jobs.begin_fetch("m", None, "s3://b/m", "key", 100.0, 2) == (job, False)
    assert jobs.begin_fetch("m", None, "s3://b/m", "other", 100.0, 2)[1]
    with pytest.raises(Conflict, match="2 versions are being fetched already"):
        jobs.begin_fetch("n", None, "s3://b/n", "third", 100.0, 2)
    assert jobs.begin_fetch("m", None, "s3://b/m", "key", 100.0, 2) == (job, False)
    assert job.progress(101.0) == (0.0, None)
    half = jobs.update(job, fetched=50, to_fetch=100)
    assert half.progress(110.0) == (0.125, 10.0)
    known = jobs.update(half, expected={"load": 5.0, "warm": 5.0})
    assert known.progress(110.0) == (10 / 30, 20.0)
    # The bytes are there, and the load has begun: the share goes on from where it was.
    loading = jobs.update(
        known, fetching=False, phase="load", phase_began=120.0, versions=(3,),
        expected={"fetch": 20.0, "load": 5.0, "warm": 5.0},
    )  # fmt: skip
    assert loading.progress(122.5) == (0.75, 7.5)
