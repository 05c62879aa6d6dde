"""When a canary is promoted and when it is rolled back: the sequential test, without a server."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inferpool.observe.families import TRIAL_BOUNDS
from inferpool.repository.rollout_policy import (
    LATER_S,
    SLOWER,
    TrialCounts,
    decide,
    interval,
)
from inferpool.repository.traffic import PROMOTED, ROLLED_BACK

TIMES = len(TRIAL_BOUNDS) + 1
COUNTS = st.builds(
    lambda failures, times: TrialCounts(failures, tuple(times.get(index, 0) for index in range(TIMES))),
    st.integers(0, 500),
    st.dictionaries(st.integers(0, TIMES - 1), st.integers(1, 2000), max_size=4),
)


def counts(failures: int = 0, **by_ms: int) -> TrialCounts:
    """`counts(3, ms_5=100)`: 3 failures, and 100 requests of 5 ms."""
    times = [0] * TIMES
    for name, count in by_ms.items():
        seconds = float(name.removeprefix("ms_")) / 1000
        times[next(i for i, bound in enumerate((*TRIAL_BOUNDS, math.inf)) if seconds <= bound)] += count
    return TrialCounts(failures, tuple(times))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
def test_the_true_share_leaves_the_intervals_at_most_as_often_as_promised(share: float) -> None:
    # Exactly: the probability of each number of failures among the paths that have stayed inside so far.
    error, horizon = 0.05, 120
    paths, left = {0: 1.0}, 0.0
    for requests in range(1, horizon + 1):
        after: dict[int, float] = {}
        for seen, chance in paths.items():
            after[seen] = after.get(seen, 0.0) + chance * (1 - share)
            after[seen + 1] = after.get(seen + 1, 0.0) + chance * share
        paths = {}
        for seen, chance in after.items():
            if chance < 1e-12:
                left += chance
                continue
            low, high = interval(seen, requests, error)
            if low <= share <= high:
                paths[seen] = chance
            else:
                left += chance
    assert 0 < left <= error


@given(st.integers(0, 3000), st.integers(0, 3000), st.sampled_from([0.05, 0.0025, 1e-5]))
def test_an_interval_holds_what_was_seen_and_narrows(seen: int, others: int, error: float) -> None:
    requests = seen + others
    low, high = interval(seen, requests, error)
    assert 0 <= low <= high <= 1
    if requests:
        assert low <= seen / requests <= high
        narrower = interval(4 * seen, 4 * requests, error)
        assert low <= narrower.low <= narrower.high <= high
    assert interval(seen, requests, error / 10).high >= high


@settings(max_examples=40)
@given(COUNTS, st.integers(1, 3000))
def test_a_canary_that_does_as_the_stable_version_is_promoted_once_it_has_its_requests(
    both: TrialCounts, least: int
) -> None:
    found = decide(both, both, least)
    assert (found is not None and found.state == PROMOTED) == (both.requests >= least)


@settings(max_examples=40)
@given(COUNTS, COUNTS, st.integers(1, 500))
def test_more_failures_never_help_a_canary(canary: TrialCounts, stable: TrialCounts, more: int) -> None:
    before = decide(canary, stable, 1)
    after = decide(TrialCounts(canary.failures + more, canary.by_time), stable, 1)
    if before is not None and before.state == ROLLED_BACK:
        assert after is not None
        assert after.state == ROLLED_BACK
    if after is not None and after.state == PROMOTED and canary.requests:
        assert before is not None
        assert before.state == PROMOTED


@settings(max_examples=40)
@given(COUNTS, COUNTS, st.integers(1, 10_000))
def test_nobody_is_promoted_before_both_have_their_requests(
    canary: TrialCounts, stable: TrialCounts, least: int
) -> None:
    assume(min(canary.requests, stable.requests) < least)
    found = decide(canary, stable, least)
    assert found is None or found.state == ROLLED_BACK


@pytest.mark.parametrize("stable_requests", [30, 500, 100_000])
def test_a_canary_that_always_fails_is_rolled_back_within_thirty_requests(stable_requests: int) -> None:
    found = decide(counts(30), counts(ms_1=stable_requests), 1000)
    assert found is not None
    assert found.state == ROLLED_BACK
    assert "30 of 30 requests failed" in found.reason


def test_a_canary_that_fails_as_often_as_the_stable_version_is_not_rolled_back() -> None:
    found = decide(counts(50, ms_1=950), counts(1000, ms_1=19_000), 1000)
    assert found is not None
    assert found.state == PROMOTED


def test_a_slow_canary_is_rolled_back_however_few_its_failures() -> None:
    found = decide(counts(ms_20=60), counts(ms_5=600), 1000)
    assert found is not None
    assert found.state == ROLLED_BACK
    assert "took more than" in found.reason
    # One request in ten is slow.
    found = decide(counts(ms_5=900, ms_90=100), counts(ms_5=10_000), 1000)
    assert found is not None
    assert found.state == ROLLED_BACK


@pytest.mark.parametrize("stable_ms", [0.05, 0.3, 1, 10, 400])
def test_a_little_slower_is_no_reason(stable_ms: float) -> None:
    # A step of the bounds more than what is allowed is seen; what is allowed is not.
    allowed_ms = SLOWER * stable_ms + 1000 * LATER_S
    times = {f"ms_{stable_ms}": 50_000}
    found = decide(counts(**{f"ms_{0.99 * allowed_ms}": 50_000}), counts(**times), 1000)
    assert found is not None
    assert found.state == PROMOTED
    found = decide(counts(**{f"ms_{1.6 * allowed_ms}": 50_000}), counts(**times), 1000)
    assert found is not None
    assert found.state == ROLLED_BACK


def test_a_canary_that_may_be_worse_waits_for_more_requests() -> None:
    # 3 of 100 against none of 10,000: more than the stable version's, and not yet for certain.
    assert decide(counts(3, ms_1=97), counts(ms_1=10_000), 100) is None
    assert decide(counts(0, ms_1=100), counts(ms_1=10_000), 100) is not None


def test_quantiles_are_the_bounds_that_hold_them() -> None:
    found = counts(ms_1=98, ms_50=2)
    assert found.quantile_s(0.5) == pytest.approx(0.001, rel=0.25)
    assert found.quantile_s(0.99) == pytest.approx(0.05, rel=0.25)
    assert TrialCounts().quantile_s(0.5) is None
