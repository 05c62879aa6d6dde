"""Split requests as plain values: how parts become one entry, and how outputs become one result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferpool.errors import InvalidInput, ModelFailed, QueueFull
from inferpool.pool.admission import Limits
from inferpool.pool.batch import Outcome, RowSlice
from inferpool.pool.device_accounts import DeviceAccount
from inferpool.pool.entry_queue import Queue
from inferpool.pool.ports import Entry, Part, VersionKey
from inferpool.pool.splitting import SplitRequest, Unjoinable, join_rows, split_entry
from inferpool.tensors import Array, Tensors

KEY = VersionKey("m", 1)


def entry(number: int, rows: int = 1, length: int = 4, row_load: float = 1.0) -> Entry:
    inputs = {"ids": np.ones((rows, length), np.int64)}
    return Entry(number, KEY, inputs, rows, "a", 8 * rows, 0.0, row_load=row_load)


def done(part: Entry, outputs: object, start: int = 0, rows: int | None = None) -> Outcome:
    """The outcome of a slice whose model gave `outputs` as "y"."""
    row_slice = RowSlice(part, start, part.rows if rows is None else start + rows)
    return Outcome(row_slice, {"y": outputs}, None)  # type: ignore[dict-item]  # models give anything


@settings(deadline=None)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_rows_are_joined_in_their_own_order(order: list[int], cut: int) -> None:
    def outputs(rows: int, length: int) -> Tensors:
        return {"y": np.random.default_rng(length).integers(1, 100, (rows, length))}

    parts = [(order[:cut], outputs(cut, 4)), (order[cut:], outputs(6 - cut, 9))]
    joined = join_rows(parts)["y"]
    assert joined.shape == (6, 9)
    for indices, tensors in parts:
        length = tensors["y"].shape[1]
        np.testing.assert_array_equal(joined[indices][:, :length], tensors["y"])
        assert not joined[indices][:, length:].any()


def test_shorter_rows_of_text_are_filled_up_with_empty_texts() -> None:
    short, long = np.array([["a"]], object), np.array([["b", "c"]], object)
    assert join_rows([([1], {"y": short}), ([0], {"y": long})])["y"].tolist() == [["b", "c"], ["a", ""]]


@pytest.mark.parametrize("odd", [np.zeros((2, 4)), np.zeros(()), np.zeros((1, 4, 1)), [1]])
def test_outputs_without_the_rows_are_not_joined(odd: Array) -> None:
    with pytest.raises(Unjoinable, match='output "y"'):
        join_rows([([0], {"y": np.zeros((1, 4))}), ([1], {"y": odd})])


def test_an_entry_of_parts_adds_up_what_its_parts_are() -> None:
    parts = [Part(entry(2, rows=2, row_load=1.5), [2, 0]), Part(entry(3, row_load=3.0), [1])]
    made = split_entry(1, parts)
    assert (made.id, made.rows, made.nbytes, made.load) == (1, 3, 24, 6.0)
    assert [part.entry.part_of for part in parts] == [1, 1]
    assert made.part_of == 0


def test_a_request_of_parts_ends_with_its_last_part() -> None:
    first, second = entry(1), entry(2)
    split = SplitRequest(split_entry(9, [Part(first, [0]), Part(second, [1])]))
    assert not split.add(done(second, np.array([[2.0]])), 0.2, 0.5, 3)
    assert split.add(done(first, np.array([[1.0]])), 0.3, 0.25, 4)
    result = split.result()
    assert result.entry_id == 9
    assert result.outputs is not None
    assert result.outputs["y"].tolist() == [[1.0], [2.0]]
    assert (result.queue_s, result.compute_s, result.batch_rows) == (0.2, 0.75, 4)


def test_a_request_ends_with_the_first_error() -> None:
    part = entry(1)
    split = SplitRequest(split_entry(9, [Part(part, [0]), Part(entry(2), [1])]))
    error = ModelFailed("no")
    assert split.add(Outcome(RowSlice(part, 0, 1), None, error), 0.1, 0.1, 1)
    assert (split.result().error, split.result().outputs) == (error, None)


def test_slices_may_end_in_any_order_and_parts_may_run_in_slices() -> None:
    large, small = entry(1, rows=3), entry(2)
    split = SplitRequest(split_entry(9, [Part(large, [0, 2, 3]), Part(small, [1])]))
    assert not split.add(done(large, np.array([[3.0]]), start=2), 0.1, 0.1, 1)
    assert not split.add(done(small, np.array([[1.0, 1.0]])), 0.1, 0.1, 1)
    assert split.add(done(large, np.array([[0.0], [2.0]]), rows=2), 0.1, 0.1, 2)
    outputs = split.result().outputs
    assert outputs is not None
    assert outputs["y"].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 0.0], [3.0, 0.0]]


def test_rows_of_one_length_whose_outputs_differ_in_shape_are_not_joined() -> None:
    large = entry(1, rows=2)
    split = SplitRequest(large)
    split.add(done(large, np.zeros((1, 2)), rows=1), 0.1, 0.1, 1)
    assert split.add(done(large, np.zeros((1, 3)), start=1), 0.1, 0.1, 1)
    error = split.result().error
    assert isinstance(error, ModelFailed)
    assert str(error.__cause__) == 'output "y" has rows of the shapes [2] and [3]'


def test_outputs_that_cannot_be_joined_at_all_are_a_failure_of_the_model() -> None:
    """The second part lacks the output that the first has."""
    first, second = entry(1), entry(2)
    split = SplitRequest(split_entry(9, [Part(first, [0]), Part(second, [1])]))
    split.add(done(first, np.zeros((1, 1))), 0.1, 0.1, 1)
    split.add(Outcome(RowSlice(second, 0, 1), {"z": np.zeros((1, 1))}, None), 0.1, 0.1, 1)
    error = split.result().error
    assert isinstance(error, ModelFailed)
    assert isinstance(error.__cause__, KeyError)


def test_an_answer_that_padding_makes_too_large_is_the_requests_fault() -> None:
    first, second = entry(1), entry(2)
    split = SplitRequest(split_entry(9, [Part(first, [0]), Part(second, [1])]))
    split.add(done(first, np.zeros((1, 100))), 0.1, 0.1, 1)
    split.add(done(second, np.zeros((1, 1))), 0.1, 0.1, 1)
    assert split.result(1600).error is None
    error = split.result(1599).error
    assert isinstance(error, InvalidInput)
    assert error.members == {"expected": 1599, "got": 1600}


def test_parts_of_a_large_request_come_behind_small_ones() -> None:
    queue = Queue(Limits(8, 1000, 10**9), lambda rows: 0.0)
    queue.offer(split_entry(1, [Part(entry(10 + n), [n]) for n in range(20)]), 0.0)
    queue.offer(entry(2), 0.0)
    assert queue.rows == 21
    first = queue.take(0.0, DeviceAccount()).slices
    assert [each.entry.id for each in first] == [2, *range(10, 17)]
    assert queue.remove(17)
    while len(queue):
        assert len(queue.take(0.0, DeviceAccount()).slices) <= 8
    assert queue.rows == queue.nbytes == 0
    assert queue.next_wakeup(0.0) is None


def test_a_request_in_parts_is_refused_as_one() -> None:
    queue = Queue(Limits(8, 20, 10**9), lambda rows: 0.0)
    queue.offer(split_entry(100, [Part(entry(101 + n), [n]) for n in range(20)]), 0.0)
    with pytest.raises(QueueFull):
        queue.offer(split_entry(200, [Part(entry(201 + n), [n]) for n in range(20)]), 0.0)
    assert len(queue) == 20
