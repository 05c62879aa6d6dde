"""Batch sizes on a GPU: which there are, that padding is never seen, and what happens without memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import OutOfMemory
from inferpool.pool.buckets import BatchBuckets, BucketedModel, between, rungs
from inferpool.pool.latency_model import Measurement

from tests.fake_gpu import FakeCard, FakeModel, expected

TABLES = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.floats(1e-5, 1.0)), unique_by=lambda line: line[0]
)
LADDERS = st.sets(st.integers(1, 200), min_size=1).map(sorted)


def table(lines: Sequence[tuple[int, float]]) -> list[Measurement]:
    return [Measurement(rows, seconds, 8) for rows, seconds in lines]


@given(TABLES, st.integers(1, 64))
def test_rungs_rise_to_the_most_and_are_each_worth_having(lines: list[tuple[int, float]], most: int) -> None:
    """Every rung but the top takes clearly less time than the one above; the top is the limit itself."""
    found = rungs(table(lines), most)
    assert found == tuple(sorted(set(found)))
    assert found[-1] == most
    seconds = dict(lines)
    measured = [rung for rung in found if rung in seconds]
    for low, high in pairwise(measured):
        assert seconds[low] < seconds[high]
    assert set(found) <= {*seconds, most}


@given(TABLES)
def test_there_are_sizes_between_only_where_padding_would_be_dear(lines: list[tuple[int, float]]) -> None:
    seconds = dict(lines)
    for size in between(table(lines)):
        low = max(rows for rows in seconds if rows < size)
        high = min(rows for rows in seconds if rows > size)
        assert seconds[high] > 1.25 * seconds[low]


def test_a_size_that_costs_as_much_as_the_next_is_left_out() -> None:
    lines = [(1, 0.0010), (2, 0.0010), (4, 0.0010), (8, 0.0011), (16, 0.0021), (32, 0.0040)]
    assert rungs(table(lines), 32) == (4, 8, 16, 32)
    assert rungs(table(lines), 24) == (4, 8, 16, 24)
    assert between(table(lines)) == [12, 24]


@given(LADDERS, st.integers(1, 1000))
def test_rows_go_up_to_the_next_rung_in_as_few_runs_as_there_can_be(sizes: list[int], rows: int) -> None:
    ladder = BatchBuckets(sizes)
    pieces = ladder.pieces(rows)
    assert sum(pieces) == rows
    assert len(pieces) == -(-rows // ladder.top)
    for piece in pieces:
        assert ladder.up(piece) == min(size for size in sizes if size >= piece)
    assert ladder.up(ladder.top + rows) is None
    assert ladder.padded(rows) == sum(map(ladder.up, pieces))


@given(LADDERS, st.lists(st.integers(0, 10), max_size=8))
def test_a_ladder_gets_shorter_rung_by_rung_and_never_empty(sizes: list[int], places: list[int]) -> None:
    """Whatever fails, in whatever order it is reported, the top is half of it, and at least one row."""
    ladder = BatchBuckets(sizes)
    for place in places:
        failed = ladder.rungs[place % len(ladder.rungs)]
        before = ladder.rungs
        assert ladder.halve(failed) == (failed > 1)
        assert ladder.top == max(1, failed // 2) if failed > 1 else ladder.rungs == before
        assert ladder.rungs == tuple(sorted(set(ladder.rungs)))


def rows_of(count: int, start: int = 0) -> np.ndarray:
    return np.arange(4 * start, 4 * (start + count), dtype=np.float32).reshape(count, 4) + 1


@given(LADDERS, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_parts_are_answered_as_if_each_had_run_alone(sizes: list[int], counts: list[int]) -> None:
    """The device sees only sizes of the ladder, with zeros below the rows; the answer has none of them."""
    card = FakeCard()
    model = BucketedModel(FakeModel(card), BatchBuckets(sizes))
    parts = [{"x": rows_of(count, 10 * place)} for place, count in enumerate(counts)]
    whole = np.concatenate([part["x"] for part in parts])
    answer = model.run_parts(parts)["sum"]
    assert answer.tolist() == expected(whole).tolist()
    assert {len(batch) for batch in card.batches} <= set(sizes)
    seen = np.concatenate([batch[batch.any(axis=1)] for batch in card.batches])
    assert seen.tolist() == whole.tolist()


def test_without_memory_the_ladder_is_halved_the_rows_are_answered_and_it_is_remembered() -> None:
    card = FakeCard(room_rows=5)
    ladder = BatchBuckets([1, 2, 4, 8, 16])
    model, other = BucketedModel(FakeModel(card), ladder), BucketedModel(FakeModel(card), ladder)
    assert model.run({"x": rows_of(13)})["sum"].tolist() == expected(rows_of(13)).tolist()
    assert ladder.rungs == (1, 2, 4)
    assert card.refused == [16, 8]
    assert other.run({"x": rows_of(8)})["sum"].tolist() == expected(rows_of(8)).tolist()
    assert card.refused == [16, 8]


def test_without_memory_for_a_single_row_that_is_the_answer() -> None:
    model = BucketedModel(FakeModel(FakeCard(room_rows=0)), BatchBuckets([1, 2]))
    with pytest.raises(OutOfMemory):
        model.run({"x": rows_of(2)})


def test_no_rows_run_as_they_are() -> None:
    card = FakeCard()
    assert BucketedModel(FakeModel(card), BatchBuckets([4])).run({"x": rows_of(0)})["sum"].tolist() == []
    assert [len(batch) for batch in card.batches] == [0]
