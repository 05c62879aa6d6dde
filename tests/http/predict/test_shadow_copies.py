"""Copies for a shadow: what is compared, and what is dropped."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from inferpool.codecs.labels import LabelsCodec, LabelsConfig
from inferpool.errors import ModelFailed, QueueFull
from inferpool.http.predict.request_metrics import RequestMetrics, RequestStats
from inferpool.http.predict.results import ResultDispatcher
from inferpool.http.predict.served_version import ServedVersion
from inferpool.http.predict.shadow_copies import (
    MOST_COPIES,
    ShadowCopies,
    ShadowTarget,
    compare,
)
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import DEFAULT_PRIORITY, LOWEST_PRIORITY, Entry, Result, VersionKey
from inferpool.repository.catalog import READY, BatchingView, VersionView
from inferpool.repository.traffic_figures import OutputDifference, few_differences, shadow_figures
from inferpool.tensors import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))
KEY = VersionKey("m", 2)
FLOATS = npst.arrays(np.float32, (3, 2), elements=st.floats(width=32))


def served(*, labels: bool = False) -> ServedVersion:
    codec = LabelsCodec(LabelsConfig(), SIGNATURE, ["a", "b"]) if labels else None
    view = VersionView(KEY, READY, signature=SIGNATURE, batching=BatchingView(True), classes=codec)
    return ServedVersion(view, RequestMetrics(Metrics({}), "m", "2", RequestStats()))


class Side:
    """The inbox, the outbox and the event loop of copies, which run when a test says so."""

    def __init__(self, share: float = 1.0) -> None:
        self.metrics = Metrics({})
        self.results = ResultDispatcher()
        self.results.attach(cast("Any", self))
        self.calls: list[Callable[[], None]] = []
        self.called = threading.Event()
        self.offered: list[Entry] = []
        self.full = False
        self.released: list[int] = []
        self.target = ShadowTarget(self.metrics, served(), 7, share)
        ids = itertools.count(1000)
        self.copies = ShadowCopies(
            cast("Any", self), self.results, lambda: 50.0, ids, lambda _, entry: self.released.append(entry)
        )
        self.answered = 0

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self.calls.append(call)
        self.called.set()

    def offer(self, entry: Entry) -> None:
        if self.full:
            raise QueueFull("on purpose")
        self.offered.append(entry)

    def run_calls(self) -> None:
        assert self.called.wait(20)
        self.called.clear()
        calls, self.calls = self.calls, []
        for call in calls:
            call()

    def answer(self, number: int, outputs: Any) -> None:
        """Answer a request of one row, which may be copied."""

        def then(result: Result) -> None:
            self.answered += 1

        inputs = {"x": np.ones((1, 2), np.float32)}
        deliver = self.copies.follow(self.target, number, inputs, [], None, then)
        deliver(Result(number, outputs, None if outputs else ModelFailed("on purpose"), 0.001, 0.002))

    @property
    def figures(self) -> Any:
        return shadow_figures(self.metrics, "m", 2, 7)


def y(*rows: list[float]) -> dict[str, Any]:
    return {"y": np.array(rows, np.float32)}


def test_a_copy_is_sent_after_the_answer_at_the_lowest_priority_and_compared() -> None:
    side = Side()
    side.answer(1, y([1.0, 2.0]))
    assert (side.answered, side.offered) == (1, [])
    side.run_calls()
    [entry] = side.offered
    assert (entry.key, entry.priority, entry.rows) == (KEY, LOWEST_PRIORITY, 1)
    assert entry.priority > DEFAULT_PRIORITY
    side.results.deliver([Result(entry.id, y([1.5, 2.0]), None, 0.002, 0.004)])
    side.run_calls()
    found = side.figures
    assert (found.compared, found.failed, found.dropped, found.slower) == (1, 0, 0, 1)
    assert (found.sent_s, found.copy_s) == (pytest.approx(0.003), pytest.approx(0.006))
    assert (found.outputs["y"].largest, found.outputs["y"].mean, found.outputs["y"].numbers) == (0.5, 0.25, 2)
    assert side.released == [entry.id]


def test_copies_are_dropped_when_too_many_are_under_way_and_answers_are_not() -> None:
    side = Side()
    for number in range(MOST_COPIES + 5):
        side.answer(number, y([1.0, 2.0]))
    assert side.answered == MOST_COPIES + 5
    side.run_calls()
    assert len(side.offered) == MOST_COPIES
    assert side.figures.dropped == 5
    # One that ends makes room for another.
    side.results.deliver([Result(side.offered[0].id, None, ModelFailed("on purpose"), 0.0)])
    assert side.figures.failed == 1
    side.answer(99, y([1.0, 2.0]))
    side.run_calls()
    assert len(side.offered) == MOST_COPIES + 1


def test_a_full_queue_drops_copies() -> None:
    side = Side()
    side.full = True
    for number in range(MOST_COPIES + 1):
        side.answer(number, y([1.0, 2.0]))
        if side.calls:
            side.run_calls()
    assert (side.figures.dropped, side.figures.failed) == (MOST_COPIES + 1, 0)


def test_the_inputs_of_a_copy_outlast_the_memory_of_the_body() -> None:
    side = Side()
    body = np.ones((1, 2), np.float32)
    deliver = side.copies.follow(side.target, 1, {"x": body[:]}, [], None, lambda _: None)
    # An engine has lent the memory of the body, and uses it for others once the result has come.
    body[:] = 7.0
    deliver(Result(1, y([1.0, 2.0]), None, 0.001, 0.002))
    side.run_calls()
    assert side.offered[0].inputs["x"].tolist() == [[1.0, 1.0]]


def test_requests_that_fail_are_not_copied_and_the_share_is_kept() -> None:
    side = Side(share=0.25)
    side.answer(1, None)
    assert (side.answered, side.calls) == (1, [])
    wanted = sum(side.target.wants(number) for number in range(1, 4001))
    assert wanted == pytest.approx(1000, abs=10)


def test_the_numbers_of_an_earlier_shadow_do_not_count() -> None:
    side = Side()
    side.target.dropped()
    later = ShadowTarget(side.metrics, served(), 8, 1.0)
    side.target.dropped()
    assert shadow_figures(side.metrics, "m", 2, 8).dropped == 0
    later.dropped()
    assert shadow_figures(side.metrics, "m", 2, 8).dropped == 1


def test_a_shadow_with_many_outputs_has_few_series() -> None:
    four = {f"y{number}": OutputDifference(number, number / 2, 10) for number in range(4)}
    assert few_differences(four) == four
    others = {"y4": OutputDifference(9.0, 1.0, 10, 1), "y5": OutputDifference(2.0, 2.0, 30)}
    found = few_differences({**others, **four})
    assert found == {**four, "": OutputDifference(9.0, 1.75, 40, 1)}
    nothing = {f"z{number}": OutputDifference() for number in range(6)}
    assert few_differences(nothing)[""] == OutputDifference()


def best_column(row: list[float]) -> int:
    """The first column with the largest number; NaN only if there is nothing else."""
    known = [column for column, number in enumerate(row) if number == number]
    return max(known, key=lambda column: row[column], default=0)


@settings(max_examples=50)
@example(np.array([[np.nan, -np.inf]] * 3, np.float32), np.array([[0, 1], [1, 0], [1, 1]], np.float32))
@given(FLOATS, FLOATS)
def test_differences_are_those_of_a_comparison_by_hand(one: Any, two: Any) -> None:
    found = compare(served(labels=True), {"y": one}, {"y": two})
    gaps, odd = [], 0
    for a, b in zip(one.ravel().tolist(), two.ravel().tolist(), strict=True):
        if a == b or (a != a and b != b):
            gaps.append(0.0)
        elif np.isfinite(a) and np.isfinite(b):
            gaps.append(abs(a - b))
        else:
            odd += 1
    each = found.outputs["y"]
    assert (each.numbers, each.non_finite) == (len(gaps), odd)
    assert each.largest == max(gaps, default=0.0)
    assert each.total == pytest.approx(sum(gaps), rel=1e-9)
    best = [[best_column(row) for row in rows.tolist()] for rows in (one, two)]
    assert (found.label_rows, found.unlike) == (3, False)
    assert found.changed_rows == sum(a != b for a, b in zip(*best, strict=True))


def test_other_shapes_and_missing_outputs_are_unlike() -> None:
    assert compare(served(), y([1.0, 2.0]), y([1.0, 2.0], [3.0, 4.0])).unlike
    assert compare(served(), y([1.0, 2.0]), {}).unlike
    assert not compare(served(), y([1.0, 2.0]), {**y([1.0, 2.0]), "z": np.zeros(1)}).unlike


def test_texts_differ_or_do_not() -> None:
    one, two = np.array([["a", "b"]], object), np.array([["a", "c"]], object)
    found = compare(served(), {"y": one}, {"y": two}).outputs["y"]
    assert (found.largest, found.total, found.numbers) == (1.0, 1.0, 2)
