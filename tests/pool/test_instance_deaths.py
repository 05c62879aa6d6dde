"""Threads of instances that die: they are replaced, and what they ran is run once more."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from inferpool.errors import (
    DeadlineExceeded,
    ModelFailed,
    NotReady,
)
from inferpool.pool.instance_set import MAX_RESTARTS
from inferpool.pool.ports import VersionKey

from tests.chaos import inferpool_chaos as chaos
from tests.pool.bench import KEY, Bench, check


def test_a_thread_that_dies_is_replaced_and_its_entries_run_once_more(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    entries = [made.offer(number) for number in range(3)]
    deadly = made.offer(chaos.DIE)
    made.go()
    results = made.outbox.take(5)
    for entry in entries:
        check(entry, results[entry.id])
    assert isinstance(results[deadly.id].error, ModelFailed)
    assert [item.state for item in made.pool.instances()] == ["ready"]
    after = made.offer(5)
    check(after, made.outbox.take(1)[after.id])


def test_an_instance_that_dies_too_often_stays_lost_and_the_pool_says_so(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.go()
    deadly = 0
    while any(item.state == "ready" for item in made.pool.instances()):
        try:
            entry = made.offer(chaos.DIE)
        except NotReady:
            break
        deadly += 1
        error = made.outbox.take(1)[entry.id].error
        assert isinstance(error, ModelFailed | NotReady)
    assert deadly <= MAX_RESTARTS
    assert [item.state for item in made.pool.instances()] == ["lost"]
    with pytest.raises(NotReady):
        made.offer(1)


def test_a_slice_that_kills_its_thread_is_retried_once_whatever_the_others_do(
    bench: Callable[..., Bench],
) -> None:
    made = bench(instances=2)
    marks = [0.0] * 400
    marks[0] = chaos.DIE
    entry = made.offer(*marks)
    made.go()
    assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    after = [made.offer(number) for number in range(4)]
    results = made.outbox.take(4)
    for item in after:
        check(item, results[item.id])
    assert [item.state for item in made.pool.instances()] == ["ready", "ready"]


@pytest.mark.parametrize("split", [False, True])
def test_a_thread_that_dies_on_a_split_request_costs_it_one_more_run(
    bench: Callable[..., Bench], split: bool
) -> None:
    """The slice that dies fails the request at its second run; other slices of the request stop."""
    made = bench()
    marks = [[1.0] * 6, [chaos.DIE] + [1.0] * 5, [1.0] * 6]
    entry = made.offer_parts(*marks) if split else made.offer(*[mark for part in marks for mark in part])
    made.go()
    assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    after = made.offer(5)
    check(after, made.outbox.take(1)[after.id])
    assert made.outbox.results.empty()


def test_a_retry_whose_deadline_has_passed_is_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    deadly = made.offer(chaos.DIE, priority=1)
    late = made.offer(3, deadline=made.clock() + 100)
    made.model.release.release(2)  # the busy run, and the run that dies
    for _ in range(2):
        assert made.model.running.acquire(timeout=60)
    # The deadly entry runs once more, by itself, while the other one waits.
    made.clock.ahead_s += 101
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[deadly.id].error, ModelFailed)
    assert isinstance(results[late.id].error, DeadlineExceeded)
    assert made.model.batches == [1, 2, 1]


def test_a_death_after_the_deadline_leads_to_no_second_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    late = made.offer(chaos.DIE, deadline=made.clock() + 100)
    assert made.model.running.acquire(timeout=60)
    made.clock.ahead_s += 101
    made.go()
    assert isinstance(made.outbox.take(1)[late.id].error, DeadlineExceeded)
    assert made.model.batches == [1]


def test_a_slice_of_a_request_that_has_failed_is_not_retried(bench: Callable[..., Bench]) -> None:
    """Two slices run at once. One of them fails the request, and then the other's thread dies."""
    made = bench(instances=2)
    entry = made.offer(*[chaos.RAISE] * 4, *[chaos.DIE] * 4, 1)
    assert made.model.running.acquire(timeout=60)
    assert made.model.running.acquire(timeout=60)
    made.go()
    assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.model.batches.count(4) <= 3


def test_everything_that_waits_is_answered_when_the_last_instance_is_lost(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system has no thread for another instance."""
    made = bench()
    made.busy()
    deadly = made.offer(chaos.DIE, group="deadly")
    large, parts, small = made.offer(*range(20)), made.offer_parts([1.0], [2.0]), made.offer(3)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    made.go()
    results = made.outbox.take(5)
    for entry in (deadly, large, parts, small):
        assert isinstance(results[entry.id].error, NotReady)
    assert [item.state for item in made.pool.instances()] == ["lost"]
    assert made.dropped("lost") == 3, "the deadly entry ran"
    with pytest.raises(NotReady, match="lost"):
        made.pool.refuse_early(0)


def test_an_idle_instance_takes_over_from_one_that_has_died(bench: Callable[..., Bench]) -> None:
    """The entries of the dead instance run again on all that are free."""
    made = bench(instances=1)
    made.busy()
    entries = [made.offer(number) for number in range(3)]
    deadly = made.offer(chaos.DIE)
    for _ in range(2):
        made.pool.start_instance(made.model, "cpu")
    made.go()
    results = made.outbox.take(5)
    for entry in entries:
        check(entry, results[entry.id])
    assert isinstance(results[deadly.id].error, ModelFailed)


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_runs_again_on_a_device_that_is_lost(bench: Callable[..., Bench], ends: bool) -> None:
    """A process that can be replaced is told first, before any of its entries has a result."""
    told: list[tuple[VersionKey, str, int]] = []
    made: Bench

    def tell(key: VersionKey, reason: str) -> None:
        told.append((key, reason, made.outbox.results.qsize()))

    made = bench(on_hung=tell if ends else None)
    made.model.lost_reason = "CUDA: an illegal memory access (error 700)"
    entries = [made.offer(1), made.offer(2), made.offer(3)]
    made.go()
    results = made.outbox.take(3)
    for entry in entries:
        assert isinstance(results[entry.id].error, NotReady)
    assert [instance.state for instance in made.pool.instances()] == ["lost"]
    assert len(made.model.batches) == 1
    if ends:
        assert told == [(KEY, f"cpu is lost: {made.model.lost_reason}", 0)]


def test_a_cancelled_retry_is_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    deadly, gone = made.offer(chaos.DIE), made.offer(3)
    made.model.release.release(2)  # the busy run, and the run that dies
    assert made.model.running.acquire(timeout=60)
    assert made.model.running.acquire(timeout=60)  # the deadly entry's second run, by itself
    made.pool.cancel(gone.id, "disconnected")
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[deadly.id].error, ModelFailed)
    assert results[gone.id].outputs is None
    assert made.model.batches == [1, 2, 1]
