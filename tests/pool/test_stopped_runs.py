"""Runs that last too long or that nobody waits for: they are stopped, or their instance hangs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from inferpool.errors import (
    DeadlineExceeded,
    Draining,
    NotReady,
    RunTimeout,
)
from inferpool.pool.ports import VersionKey
from inferpool.pool.run_limits import GRACE_S

from tests.chaos import inferpool_chaos as chaos
from tests.pool.bench import KEY, Bench, check
from tests.server import wait_until


def test_a_deadline_that_passes_during_the_run_is_answered_then(bench: Callable[..., Bench]) -> None:
    """The neighbour in the batch gets its answer, and the model is not asked to stop."""
    made = bench()
    made.busy()
    late, other = made.offer(1, deadline=made.clock() + 1000), made.offer(2)
    made.go(1)
    made.outbox.take(1)
    assert made.model.running.acquire(timeout=60)
    assert made.model.batches == [1, 2]
    made.pool.cancel(late.id, "deadline")
    made.pool.cancel(late.id, "disconnected")
    result = made.outbox.take(1)[late.id]
    assert isinstance(result.error, DeadlineExceeded)
    assert "while the model ran" in str(result.error)
    assert result.runs_on
    assert made.outbox.unread.empty()
    assert not made.model.stops
    made.go()
    answer = made.outbox.take(1)[other.id]
    check(other, answer)
    assert not answer.runs_on
    assert made.outbox.unread.get(timeout=60) == late.id
    made.pool.cancel(other.id, "deadline")
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.outbox.unread.empty()
    assert made.dropped("deadline") == 1
    assert made.dropped("disconnected") == 0


def test_a_run_is_stopped_when_nobody_waits_for_any_entry_of_it(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    entries = [made.offer(1), made.offer(2)]
    made.go(1)
    made.outbox.take(1)
    assert made.model.running.acquire(timeout=60)
    made.pool.cancel(entries[0].id, "disconnected")
    assert not made.model.stops, "one client still waits"
    made.model.stoppable = True
    made.pool.cancel(entries[1].id, "deadline")
    assert set(made.outbox.take(2)) == {entry.id for entry in entries}
    assert {made.outbox.unread.get(timeout=60) for _ in entries} == {entry.id for entry in entries}
    assert made.model.stops
    made.model.stoppable = False
    after = made.offer(3)
    made.go()
    check(after, made.outbox.take(1)[after.id])
    assert made.pool.drain(60)
    assert made.outbox.results.empty()


@pytest.mark.parametrize("ran_s", [101.0, 60.0], ids=["out of time", "much longer than expected"])
def test_a_batch_that_runs_too_long_is_run_again_one_by_one(
    bench: Callable[..., Bench], ran_s: float
) -> None:
    """The guilty entry is answered with RunTimeout when it times out alone, its neighbours get answers."""
    made = bench(run_timeout_s=100.0)
    made.model.stoppable = True
    made.model.endless = chaos.WAIT
    made.busy()
    good = [made.offer(1), made.offer(2)]
    guilty = made.offer(chaos.WAIT)
    expired = made.offer(4, deadline=made.clock() + 50)
    made.go()
    made.outbox.take(1)
    wait_until(lambda: made.model.batches == [1, 4], "all four run together")
    assert made.pool.check_runs() - made.clock() == pytest.approx(GRACE_S, abs=1)
    made.clock.ahead_s += ran_s
    made.pool.check_runs()
    results = made.outbox.take(3)
    for entry in good:
        check(entry, results[entry.id])
    assert isinstance(results[expired.id].error, DeadlineExceeded)
    wait_until(lambda: made.model.batches == [1, 4, 1, 1, 1], "the guilty entry runs alone")
    made.clock.ahead_s += 101
    made.pool.check_runs()
    assert isinstance(made.outbox.take(1)[guilty.id].error, RunTimeout)
    after = made.offer(3)
    check(after, made.outbox.take(1)[after.id])


def test_an_instance_whose_run_does_not_stop_hangs_and_is_replaced(bench: Callable[..., Bench]) -> None:
    made = bench(run_timeout_s=100.0)
    entry = made.busy()
    made.clock.ahead_s += 101
    made.pool.check_runs()
    assert made.pool.hung() is None
    made.clock.ahead_s += GRACE_S + 1
    made.pool.check_runs()
    result = made.outbox.take(1)[entry.id]
    assert isinstance(result.error, RunTimeout)
    assert result.runs_on
    states = made.pool.instances()
    assert sorted(state.state for state in states) == ["hung", "ready"]
    assert max(state.run_s for state in states) == pytest.approx(107, abs=5)
    assert made.pool.hung() == "1 of 2 instances hang: a run has taken 107 s"
    assert made.busy_seconds() == pytest.approx(107, abs=5)
    other = made.busy()  # the replacement takes it
    made.go(1)
    assert made.model.running.acquire(timeout=0) is False
    made.go()
    check(other, made.outbox.take(1)[other.id])
    assert made.outbox.unread.get(timeout=60) == entry.id
    wait_until(lambda: [each.state for each in made.pool.instances()] == ["ready"], "the surplus one ends")
    assert made.busy_seconds() == pytest.approx(107, abs=5)
    assert made.pool.drain(60)


def test_without_an_instance_that_does_not_hang_requests_are_refused(bench: Callable[..., Bench]) -> None:
    """The process ends when it is told that an instance hangs, so nothing is replaced meanwhile."""
    told: list[tuple[VersionKey, str]] = []
    made = bench(run_timeout_s=100.0, on_hung=lambda key, reason: told.append((key, reason)))
    made.busy()
    waiting = made.offer(1)
    made.clock.ahead_s += 101
    made.pool.check_runs()
    made.clock.ahead_s += GRACE_S + 1
    made.pool.check_runs()
    assert told == [(KEY, "1 of 1 instances hang: a run has taken 107 s")]
    with pytest.raises(NotReady, match="hangs"):
        made.offer(2)
    made.go()
    assert waiting.id in made.outbox.take(2), "the instance came back"
    assert made.pool.hung() is None


def test_a_run_that_overstays_makes_admission_expect_more_of_it(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    made.clock.ahead_s += 20
    with pytest.raises(DeadlineExceeded):
        made.offer(1, deadline=made.clock() + 10)
    made.offer(1, deadline=made.clock() + 100)


def test_draining_answers_and_stops_what_still_runs(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.model.stoppable = True
    entry = made.busy()
    assert not made.pool.drain(0)
    assert isinstance(made.outbox.take(1)[entry.id].error, Draining)
    assert made.outbox.unread.get(timeout=60) == entry.id
    wait_until(lambda: not made.pool.is_running, "the thread has ended")
