"""Requests that run in slices or parts: their answers are joined in order, and they end once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from inferpool.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelFailed,
)
from inferpool.tensors import Tensors

from tests.chaos import inferpool_chaos as chaos
from tests.pool.bench import Bench, check
from tests.server import wait_until


def test_wrong_rows_in_a_slice_run_the_whole_request_at_once(bench: Callable[..., Bench]) -> None:
    """The answer is the one of a single run, which has a row too many here, as the model gives it alone."""
    made = bench()
    marks = [*map(float, range(12)), chaos.WRONG_ROWS, *map(float, range(7))]
    large = made.offer(*marks)
    made.go()
    result = made.outbox.take(1)[large.id]
    assert result.outputs is not None
    sums = chaos.expected(large.inputs["x"]).tolist()
    assert result.outputs["sum"].tolist() == [*sums, 0.0]
    assert made.model.batches[-1] == 20
    assert made.pool.drain(60)
    assert made.outbox.results.empty()


def test_the_rows_of_a_part_with_wrong_rows_run_one_by_one(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    split = made.offer_parts([1, chaos.WRONG_ROWS, 2], [3], group="parts")
    made.go()
    result = made.outbox.take(2)[split.id]
    assert result.outputs is not None
    rows = np.concatenate([part.entry.inputs["x"] for part in split.parts])
    assert result.outputs["sum"].tolist() == chaos.expected(rows).tolist()


def test_a_large_request_is_joined_in_order_whichever_instance_runs_its_slices(
    bench: Callable[..., Bench],
) -> None:
    made = bench(instances=3)
    entry = made.offer(*range(1000))
    made.go()
    result = made.outbox.take(1)[entry.id]
    check(entry, result)
    assert max(made.model.batches) == 4
    assert made.pool.waiting() == (0, 0.0, 0.0)


def test_a_slice_that_fails_fails_its_request_once_and_stops_the_rest(bench: Callable[..., Bench]) -> None:
    made = bench()
    marks = [0.0] * 1000
    marks[20] = chaos.RAISE
    entry = made.offer(*marks)
    other = made.offer(1)
    made.go()
    results = made.outbox.take(2)
    assert isinstance(results[entry.id].error, ModelFailed)
    check(other, results[other.id])
    assert len(made.model.batches) < 10
    assert made.outbox.results.empty()


def test_slices_that_cannot_be_joined_fail_their_request_once(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    made = bench()
    widths = itertools.count(1)

    def run(inputs: Tensors) -> Tensors:
        return {"sum": np.zeros((len(inputs["x"]), next(widths)))}

    made.model.model.run = run  # type: ignore[method-assign, assignment]
    made.go()
    for _ in range(2):
        entry = made.offer(*range(20))
        assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    assert [item.state for item in made.pool.instances()] == ["ready"]
    assert len(caplog.records) == 1, "one such line a minute"
    assert "m/1 gave outputs that cannot be joined (0 more since the last such line)" in caplog.text


@pytest.mark.parametrize(("max_bytes", "error"), [(math.inf, ModelFailed), (10**9, InvalidInput)])
def test_parts_whose_outputs_are_too_large_to_join_fail_their_request_alone(
    bench: Callable[..., Bench], max_bytes: float, error: type[Exception]
) -> None:
    """Each output is small. Joined, all rows get the length of the longest, which no memory holds."""
    made = bench(max_joined_bytes=max_bytes)
    made.busy()

    def run(inputs: Tensors) -> Tensors:
        long = inputs["x"][0, 0] == 1  # a view of one number, which takes no memory itself
        return {"sum": np.broadcast_to(np.float64(1), (len(inputs["x"]), 2**50 if long else 1))}

    made.model.model.run = run  # type: ignore[method-assign, assignment]
    entry = made.offer_parts([1], [2], group=99)
    neighbour = made.offer(3)
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[entry.id].error, error)
    assert results[neighbour.id].error is None
    after = made.offer(3)
    assert made.outbox.take(1)[after.id].error is None
    assert [item.state for item in made.pool.instances()] == ["ready"]


@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_parts_are_answered_as_one_request(bench: Callable[..., Bench], rows: int, instances: int) -> None:
    """They may share a batch, fill one each, or run in slices."""
    made = bench(instances=instances)
    marks = [[float(rows * part + row) for row in range(rows)] for part in range(3)]
    entry = made.offer_parts(*marks)
    made.go()
    outputs = made.outbox.take(1)[entry.id].outputs
    assert outputs is not None
    assert outputs["sum"].tolist() == [3 * mark + 1 for part in marks for mark in part]
    assert made.pool.drain(60)
    assert made.outbox.results.empty(), "no result of a part is seen"


def test_a_part_that_fails_ends_its_request_and_the_others_do_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    first = made.busy()
    entry = made.offer_parts([chaos.RAISE] * 5, [1.0] * 5, [2.0] * 5)
    made.go()
    results = made.outbox.take(2)
    check(first, results[first.id])
    assert isinstance(results[entry.id].error, ModelFailed)
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.model.batches == [1, 5]


@pytest.mark.parametrize("rows", [1, 10])
def test_an_entry_in_parts_is_dropped_once(bench: Callable[..., Bench], rows: int) -> None:
    """However many of its parts have waited too long, and whether they fit in a batch or not."""
    made = bench()
    first = made.busy()
    entry = made.offer_parts(*[[1.0] * rows] * 4, deadline=made.clock() + 100)
    last = made.offer(5)
    made.clock.ahead_s += 101
    made.go()
    results = made.outbox.take(3)
    assert results.keys() == {first.id, entry.id, last.id}
    assert isinstance(results[entry.id].error, DeadlineExceeded)
    assert made.pool.drain(60)
    assert made.outbox.results.empty(), "no result of a part is seen"
    assert made.dropped("deadline") == 1


@pytest.mark.parametrize("rows", [5, 10])
def test_running_parts_of_a_cancelled_entry_give_no_result(bench: Callable[..., Bench], rows: int) -> None:
    """The client leaves while the first part runs and the others wait."""
    made = bench()
    entry = made.offer_parts(*[[1.0] * rows] * 4)
    assert made.model.running.acquire(timeout=60)
    made.pool.cancel(entry.id, "disconnected")
    last = made.offer(5)
    made.go()
    assert made.outbox.take(2).keys() == {entry.id, last.id}
    assert made.pool.drain(60)
    assert made.outbox.results.empty(), "no result of a part is seen"
    assert made.dropped("disconnected") == 1


def test_a_split_request_of_which_all_rows_run_is_answered_once(bench: Callable[..., Bench]) -> None:
    made = bench(instances=2)
    entry = made.offer_parts([1.0] * 8, [2.0] * 8)
    assert made.model.running.acquire(timeout=60)
    assert made.model.running.acquire(timeout=60)
    made.pool.cancel(entry.id, "disconnected")
    result = made.outbox.take(1)[entry.id]
    assert result.error is not None
    assert result.runs_on
    made.go(1)
    wait_until(lambda: made.ran() == 1, "one part has run")
    assert made.outbox.unread.empty(), "the other part is still read"
    made.go()
    assert made.outbox.unread.get(timeout=60) == entry.id
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.outbox.unread.empty()
    assert made.dropped("disconnected") == 1


def test_a_small_request_waits_for_one_slice_of_a_large_one_at_most(bench: Callable[..., Bench]) -> None:
    made = bench()
    large = made.offer(*range(100))
    assert made.model.running.acquire(timeout=60)
    small = [made.offer(number) for number in range(5)]
    made.model.release.release(2)  # the slice that runs, and the batch of the small ones
    results = made.outbox.take(5)
    for entry in small:
        check(entry, results[entry.id])
    assert made.model.batches[:2] == [4, 5]
    made.go()
    check(large, made.outbox.take(1)[large.id])
