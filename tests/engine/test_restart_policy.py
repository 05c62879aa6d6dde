"""What becomes of engines that die, and of the versions that they ran or loaded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from inferpool.engine.restart_policy import (
    CRASHES,
    EARLY_S,
    FIRST_PAUSE_S,
    MOST_PAUSE_S,
    WINDOW_S,
    RestartPolicy,
    Version,
)

DEVICE = "cpu"
OWN = "a/1"
A: Version = ("a", 1)
B: Version = ("b", 2)
HOW = "was ended by SIGSEGV"


class Clock:
    """The moment `now`, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_version_that_crashes_three_times_in_ten_minutes_gets_an_engine_of_its_own() -> None:
    policy = RestartPolicy(Clock())
    decisions = [policy.died(DEVICE, HOW, 60.0, running=[A]) for _ in range(CRASHES)]
    assert [tuple(decision.isolate) for decision in decisions] == [(), (), (A,)]
    assert not any(decision.fail or decision.pause_s for decision in decisions)


def test_crashes_that_are_long_ago_do_not_count() -> None:
    clock = Clock()
    policy = RestartPolicy(clock)
    for _ in range(10):
        assert not policy.died(DEVICE, HOW, 60.0, running=[A]).isolate
        clock.now += WINDOW_S / (CRASHES - 1)


def test_crashes_of_another_version_do_not_count() -> None:
    policy = RestartPolicy(Clock())
    for _ in range(CRASHES - 1):
        policy.died(DEVICE, HOW, 60.0, running=[A])
    assert tuple(policy.died(DEVICE, HOW, 60.0, running=[B]).isolate) == ()
    assert tuple(policy.died(DEVICE, HOW, 60.0, running=[A, B]).isolate) == (A,)


def test_a_new_version_that_ends_the_engine_while_it_loads_leaves_it_at_once() -> None:
    policy = RestartPolicy(Clock())
    assert tuple(policy.died(DEVICE, HOW, 1.0, loading=[A]).isolate) == (A,)


def test_a_version_that_has_loaded_before_may_load_again_when_the_engine_is_killed() -> None:
    policy = RestartPolicy(Clock())
    policy.loaded(DEVICE, A)
    assert not policy.died(DEVICE, HOW, 1.0, loading=[A]).isolate


def test_a_version_whose_load_ends_its_own_engine_twice_has_failed() -> None:
    policy = RestartPolicy(Clock())
    assert not policy.died(OWN, HOW, 1.0, own=A, loading=[A]).fail
    failed = policy.died(OWN, HOW, 1.0, own=A, loading=[A]).fail
    assert HOW in failed[A]


def test_a_load_that_succeeds_in_between_begins_the_count_anew() -> None:
    policy = RestartPolicy(Clock())
    for _ in range(5):
        assert not policy.died(OWN, HOW, 1.0, own=A, loading=[A]).fail
        policy.loaded(OWN, A)


def test_a_version_whose_requests_end_its_own_engine_three_times_has_failed() -> None:
    policy = RestartPolicy(Clock())
    for crash in range(CRASHES - 1):
        decision = policy.died(OWN, HOW, 60.0, own=A, running=[A], confirmed=[A])
        assert not decision.fail
        assert decision.pause_s == FIRST_PAUSE_S * 2**crash
    assert HOW in policy.died(OWN, HOW, 60.0, own=A, running=[A], confirmed=[A]).fail[A]


def test_an_engine_that_is_killed_from_outside_never_fails_its_version() -> None:
    policy = RestartPolicy(Clock())
    for _ in range(100):
        assert not policy.died(OWN, HOW, 60.0, own=A, running=[A]).fail


def test_an_engine_that_dies_at_once_is_started_again_after_longer_and_longer_pauses() -> None:
    policy = RestartPolicy(Clock())
    pauses = [policy.died(DEVICE, HOW, 0.1).pause_s for _ in range(8)]
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == MOST_PAUSE_S
    assert policy.died(DEVICE, HOW, EARLY_S).pause_s == 0
    assert policy.died(DEVICE, HOW, 0.1).pause_s == FIRST_PAUSE_S


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100),
            st.sets(st.sampled_from([A, B])),
            st.sets(st.sampled_from([A, B])),
            st.floats(0, 60),
        ),
        max_size=30,
    )
)
def test_no_version_of_the_shared_engine_fails_and_no_pause_is_long(
    deaths: list[tuple[float, set[Version], set[Version], float]],
) -> None:
    clock = Clock()
    policy = RestartPolicy(clock)
    for later_s, running, loading, lived_s in deaths:
        clock.now += later_s
        decision = policy.died(DEVICE, HOW, lived_s, running=running, loading=loading)
        assert not decision.fail
        assert 0 <= decision.pause_s <= MOST_PAUSE_S
        assert set(decision.isolate) <= running | loading
        assert len(set(decision.isolate)) == len(decision.isolate)
