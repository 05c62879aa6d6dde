"""Batch sizes on a GPU: how they are chosen, that padding is never seen, and what happens without memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import OutOfMemory
from inferpool.pool.buckets import BatchBuckets, BucketedModel, choose_buckets, sizes_between
from inferpool.pool.latency_model import Measurement

from tests.fake_gpu import FakeCard, FakeModel, expected

TABLES = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.floats(1e-5, 1.0)), unique_by=lambda line: line[0]
)
SIZES = st.sets(st.integers(1, 200), min_size=1).map(sorted)


def table(lines: Sequence[tuple[int, float]]) -> list[Measurement]:
    return [Measurement(rows, seconds, 8) for rows, seconds in lines]


@given(TABLES, st.integers(1, 64))
def test_buckets_rise_to_the_limit_and_each_is_worth_having(
    lines: list[tuple[int, float]], max_rows: int
) -> None:
    """Every bucket takes clearly less time than the next; the largest is the limit itself."""
    found = choose_buckets(table(lines), max_rows)
    assert found == tuple(sorted(set(found)))
    assert found[-1] == max_rows
    seconds = dict(lines)
    measured = [size for size in found if size in seconds]
    for low, high in pairwise(measured):
        assert seconds[low] < seconds[high]
    assert set(found) <= {*seconds, max_rows}


@given(TABLES)
def test_sizes_between_are_measured_only_if_padding_would_cost_much(lines: list[tuple[int, float]]) -> None:
    seconds = dict(lines)
    for size in sizes_between(table(lines)):
        low = max(rows for rows in seconds if rows < size)
        high = min(rows for rows in seconds if rows > size)
        assert seconds[high] > 1.25 * seconds[low]


def test_a_size_that_costs_as_much_as_the_next_is_left_out() -> None:
    lines = [(1, 0.0010), (2, 0.0010), (4, 0.0010), (8, 0.0011), (16, 0.0021), (32, 0.0040)]
    assert choose_buckets(table(lines), 32) == (4, 8, 16, 32)
    assert choose_buckets(table(lines), 24) == (4, 8, 16, 24)
    assert sizes_between(table(lines)) == [12, 24]


@given(SIZES, st.integers(1, 1000))
def test_rows_run_in_the_next_bucket_and_in_as_few_runs_as_possible(sizes: list[int], rows: int) -> None:
    buckets = BatchBuckets(sizes)
    runs = buckets.split(rows)
    assert sum(runs) == rows
    assert len(runs) == -(-rows // buckets.largest)
    padded = [min(size for size in sizes if size >= run) for run in runs]
    assert [buckets.bucket_for(run) for run in runs] == padded
    assert buckets.bucket_for(buckets.largest + rows) is None
    assert buckets.padded_rows(rows) == sum(padded)


@given(SIZES, st.lists(st.integers(0, 10), max_size=8))
def test_buckets_without_memory_are_halved_and_one_row_always_stays(
    sizes: list[int], choices: list[int]
) -> None:
    """In whatever order failures are reported, half of the failed size is the largest afterwards."""
    buckets = BatchBuckets(sizes)
    for choice in choices:
        failed = buckets.sizes[choice % len(buckets.sizes)]
        before = buckets.sizes
        assert buckets.halve(failed) == (failed > 1)
        assert buckets.largest == max(1, failed // 2) if failed > 1 else buckets.sizes == before
        assert buckets.sizes == tuple(sorted(set(buckets.sizes)))


def rows_of(count: int, start: int = 0) -> np.ndarray:
    return np.arange(4 * start, 4 * (start + count), dtype=np.float32).reshape(count, 4) + 1


@given(SIZES, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_parts_are_answered_as_if_each_had_run_alone(sizes: list[int], counts: list[int]) -> None:
    """The device sees only bucket sizes, padded with zeros; the answer has no padding."""
    card = FakeCard()
    model = BucketedModel(FakeModel(card), BatchBuckets(sizes))
    parts = [{"x": rows_of(count, 10 * index)} for index, count in enumerate(counts)]
    rows = np.concatenate([part["x"] for part in parts])
    answer = model.run_parts(parts)["sum"]
    assert answer.tolist() == expected(rows).tolist()
    assert {len(batch) for batch in card.batches} <= set(sizes)
    seen = np.concatenate([batch[batch.any(axis=1)] for batch in card.batches])
    assert seen.tolist() == rows.tolist()


def test_a_bucket_without_memory_is_halved_once_for_all_instances_and_the_rows_are_answered() -> None:
    card = FakeCard(room_rows=5)
    buckets = BatchBuckets([1, 2, 4, 8, 16])
    model, other = BucketedModel(FakeModel(card), buckets), BucketedModel(FakeModel(card), buckets)
    assert model.run({"x": rows_of(13)})["sum"].tolist() == expected(rows_of(13)).tolist()
    assert buckets.sizes == (1, 2, 4)
    assert card.refused == [16, 8]
    assert other.run({"x": rows_of(8)})["sum"].tolist() == expected(rows_of(8)).tolist()
    assert card.refused == [16, 8]


def test_no_memory_for_a_single_row_is_an_error() -> None:
    model = BucketedModel(FakeModel(FakeCard(room_rows=0)), BatchBuckets([1, 2]))
    with pytest.raises(OutOfMemory):
        model.run({"x": rows_of(2)})


def test_a_request_without_rows_is_not_padded() -> None:
    card = FakeCard()
    assert BucketedModel(FakeModel(card), BatchBuckets([4])).run({"x": rows_of(0)})["sum"].tolist() == []
    assert [len(batch) for batch in card.batches] == [0]
