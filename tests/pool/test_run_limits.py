"""When runs are stopped, and when they count as hung."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from inferpool.pool.run_limits import GO_ON, GRACE_S, HUNG, PART, PATIENCE, STOP, RunLimits

SECONDS = st.floats(0, 1e6)


@given(timeout_s=st.one_of(st.just(0.0), st.floats(0.01, 1e4)), ran_s=SECONDS, expected_s=SECONDS)
def test_a_run_goes_on_until_its_time_is_up(timeout_s: float, ran_s: float, expected_s: float) -> None:
    limits = RunLimits(timeout_s)
    action, moment = limits.judge(100 + ran_s, 100.0, expected_s, math.inf, nobody_waits=False)
    if not timeout_s:
        assert (action, moment) == (GO_ON, math.inf)
    elif 100 + ran_s < 100 + timeout_s:
        assert (action, moment) == (GO_ON, min(100 + timeout_s, 100 + ran_s + GRACE_S))
    else:
        assert action == STOP


@given(
    timeout_s=st.one_of(st.just(0.0), st.floats(0.01, 1e4)),
    ran_s=SECONDS,
    since_stop=st.floats(0, 1),
    expected_s=SECONDS,
    nobody_waits=st.booleans(),
)
def test_a_run_that_was_asked_to_stop_is_asked_again_until_it_counts_as_hung(
    timeout_s: float, ran_s: float, since_stop: float, expected_s: float, nobody_waits: bool
) -> None:
    now = 100 + ran_s
    stop_asked = now - since_stop * ran_s
    action, moment = RunLimits(timeout_s).judge(now, 100.0, expected_s, stop_asked, nobody_waits)
    if now < stop_asked + GRACE_S:
        assert action == STOP
    if action == HUNG:
        assert moment == math.inf
    else:
        assert action == STOP
        assert moment > now, "the thread that asks does not spin"
    if not nobody_waits:
        assert (action == HUNG) == (now >= max(stop_asked, 100 + (timeout_s or math.inf)) + GRACE_S)


@given(timeout_s=st.floats(0.01, 1e4), ran_s=SECONDS, expected_s=st.floats(0, 1e3))
def test_a_batch_that_takes_ten_times_what_was_expected_is_parted(
    timeout_s: float, ran_s: float, expected_s: float
) -> None:
    now = 100 + ran_s
    limits = RunLimits(timeout_s)
    action, moment = limits.judge(now, 100.0, expected_s, math.inf, nobody_waits=False, parts=True)
    if now >= 100 + timeout_s:
        assert action == STOP
    elif now >= 100 + max(GRACE_S, PATIENCE * expected_s):
        assert action == PART
    else:
        assert action == GO_ON
        assert now < moment <= 100 + max(GRACE_S, PATIENCE * expected_s)
    # If it cannot be stopped, it does not count as hung for that.
    assert limits.judge(100 + timeout_s, 100.0, expected_s, 100.0, nobody_waits=False)[0] == STOP


def test_a_slow_model_does_not_hang_because_its_client_gave_up() -> None:
    """Some runtimes cannot stop a run. It may take as long as runs of this size do, several times over."""
    limits = RunLimits(0)
    assert limits.judge(20.0, 0.0, 12.0, 2.0, nobody_waits=True)[0] == STOP
    assert limits.judge(12 * PATIENCE, 0.0, 12.0, 2.0, nobody_waits=True)[0] == HUNG
    assert RunLimits(30.0).judge(30 + GRACE_S, 0.0, 12.0, 2.0, nobody_waits=True)[0] == HUNG
