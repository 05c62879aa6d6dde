"""The turns of explanations: rests and small parts beside predictions, and none on a quiet server."""

from __future__ import annotations

import math
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
from inferpool.http.explain.passes import Passes
from inferpool.http.explain.turns import (
    BUSY_S,
    FIRST_ROWS,
    LONGEST_REST_S,
    LOOK_S,
    REST,
    REST_BETWEEN_S,
    TRY_AFTER,
    PartSize,
    SharedTurn,
    Turns,
)
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.predictor import Predictor
from inferpool.pool.ports import Result
from inferpool.tensors import Tensors


class Clock:
    """A clock that tests move, and that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, gone: threading.Event, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class InstantLoop:
    """An event loop that calls at once."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        callback(*arguments)


class InstantPredictor:
    """A predictor whose passes have run as soon as they are offered."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.offered = self.ended = 0

    def submit_pass(
        self, _context: object, _tensors: Tensors, _until: float, arrived: Callable[[Result], None], _: object
    ) -> SimpleNamespace:
        self.offered += 1
        arrived(Result(self.offered, {}, None, 0.0, 0.001, 1))
        return SimpleNamespace(rows=1)

    def end_pass(self, _entry: object) -> None:
        self.ended += 1


class Explaining:
    """A shared turn, and an explanation whose parts take `seconds` each."""

    def __init__(self, last_prediction: float) -> None:
        self.clock = Clock()
        self.last_prediction = last_prediction
        self.shared = SharedTurn(self.clock, lambda: self.last_prediction, self.clock.sleep)
        self.turns = self.turns_of_another()

    def turns_of_another(self) -> Turns:
        return Turns(self.shared, self.clock, threading.Event())

    def part(self, seconds: float, until: float = math.inf, rows: int = 0) -> None:
        self.clock.now += seconds
        self.turns.next_part(until, rows)


def test_an_explanation_on_a_quiet_server_never_rests() -> None:
    explaining = Explaining(last_prediction=100 - BUSY_S)
    explaining.turns.begin(math.inf)
    for _ in range(10):
        explaining.part(0.01)
        assert not explaining.turns.is_busy
    explaining.turns.end()
    assert explaining.clock.slept == []


def test_beside_predictions_each_part_is_followed_by_a_rest_in_proportion() -> None:
    explaining = Explaining(last_prediction=math.inf)
    explaining.turns.begin(math.inf)
    assert explaining.turns.is_busy
    for _ in range(3):
        explaining.part(0.001)
    explaining.part(0.05)
    assert explaining.clock.slept == pytest.approx([REST * 0.001] * 3 + [LONGEST_REST_S])
    explaining.turns.end()
    explaining.turns.begin(math.inf)
    assert explaining.clock.slept[-1] == pytest.approx(REST_BETWEEN_S)


def test_predictions_that_come_and_go_are_noticed() -> None:
    explaining = Explaining(last_prediction=0.0)
    explaining.turns.begin(math.inf)
    explaining.last_prediction = explaining.clock.now
    explaining.part(2 * LOOK_S)
    assert explaining.turns.is_busy
    explaining.part(BUSY_S)
    explaining.part(2 * LOOK_S)
    assert not explaining.turns.is_busy


def test_rests_are_shorter_if_the_least_passes_would_not_be_run_in_time() -> None:
    explaining = Explaining(last_prediction=math.inf)
    explaining.turns.least_rows = 10 * FIRST_ROWS
    until = explaining.clock.now + 0.2
    explaining.turns.begin(until)
    for number in range(10):
        assert explaining.clock.now < until
        explaining.part(0.01, until, (number + 1) * FIRST_ROWS)
    assert sum(explaining.clock.slept[:9]) < 0.1


def test_explanations_take_turns() -> None:
    explaining = Explaining(last_prediction=math.inf)
    other = explaining.turns_of_another()
    explaining.turns.begin(math.inf)
    began = threading.Event()

    def explain() -> None:
        other.begin(math.inf)
        began.set()
        other.end()

    thread = threading.Thread(target=explain)
    thread.start()
    assert not began.is_set()
    explaining.turns.end()
    thread.join()
    assert began.is_set()


def test_each_explanation_has_a_part_before_another_has_two() -> None:
    explaining = Explaining(last_prediction=math.inf)
    other = explaining.turns_of_another()
    parts: list[str] = []

    def explain() -> None:
        other.begin(math.inf)
        parts.append("other")
        other.end()

    explaining.turns.begin(math.inf)
    parts.append("first")
    thread = threading.Thread(target=explain)
    thread.start()
    while explaining.shared.waiting < 2:
        thread.join(0.001)
    explaining.part(0.001)
    parts.append("first")
    explaining.turns.end()
    thread.join()
    assert parts == ["first", "other", "first"]


def test_once_predictions_begin_no_pass_is_left_to_run_during_a_rest() -> None:
    explaining = Explaining(last_prediction=0.0)
    predictor = InstantPredictor(explaining.clock)
    passes = Passes(
        cast("Predictor", predictor), cast("PredictContext", None), cast("AbstractEventLoop", InstantLoop()),
        explaining.shared, lambda _entry, _result: None,
    )  # fmt: skip
    passes.turns.begin(math.inf)
    offered = []
    for number, _ in enumerate(passes.run([{}] * 6, math.inf)):
        offered.append(predictor.offered - number)
        if number == 1:
            explaining.last_prediction = math.inf
            explaining.clock.now += 2 * LOOK_S
    passes.turns.end()
    # Counts the pass that is being read, and the passes that are offered and not read yet.
    assert offered == [2, 2, 1, 1, 1, 1]
    assert predictor.ended == 6


def test_a_turn_that_does_not_come_is_given_up_when_time_is_up_or_the_client_gone() -> None:
    explaining = Explaining(last_prediction=math.inf)
    explaining.turns.begin(math.inf)
    late = explaining.turns_of_another()
    late.begin(explaining.clock.now)
    assert not late.is_busy
    gone = threading.Event()
    gone.set()
    left = Turns(explaining.shared, explaining.clock, gone)
    left.begin(math.inf)
    assert not left.is_busy
    left.end()
    explaining.turns.end()


def test_a_part_grows_while_more_rows_take_little_longer_and_shrinks_if_they_do() -> None:
    size = PartSize()
    size.ran(2, 0.0001)
    for _ in range(10):
        size.ran(size.rows, 0.0001 + 2e-6 * size.rows)
    assert FIRST_ROWS < size.rows <= 128
    size.ran(size.rows, 0.01)
    assert size.rows <= 64
    slow = PartSize()
    slow.ran(2, 0.05)
    for _ in range(10):
        slow.ran(slow.rows, 0.05)  # whatever the rows, as of a model that sleeps
    assert slow.rows == FIRST_ROWS << 10
    dear = PartSize()
    dear.ran(2, 0.1)
    for _ in range(10):
        dear.ran(dear.rows, 0.05 * dear.rows)
    assert dear.rows == 2
    size.ran(4096, 1.0)  # a part of a quiet moment says nothing of small ones
    assert size.rows > 1


def test_a_part_that_was_slow_by_chance_makes_parts_small_for_a_while_only() -> None:
    size = PartSize()
    size.ran(2, 0.05)
    for _ in range(4):
        size.ran(size.rows, 1.0)
    assert size.rows == 2
    for _ in range(5 * TRY_AFTER):
        size.ran(size.rows, 0.05)
    assert size.rows > FIRST_ROWS
    before = size.rows
    size.ran(3, 1.0)  # the last part of an explanation has few rows
    assert size.rows == before // 2


def test_parts_do_not_stay_small_on_a_machine_that_has_become_slower() -> None:
    size = PartSize()
    size.ran(2, 0.05)
    for _ in range(10 * TRY_AFTER):
        size.ran(size.rows, 0.2)  # whatever the rows
    assert size.rows > FIRST_ROWS


def test_a_larger_part_of_a_model_that_is_dear_by_row_is_tried_seldom() -> None:
    size = PartSize()
    size.ran(2, 0.1)
    sizes = []
    for _ in range(10 * TRY_AFTER):
        sizes.append(size.rows)
        size.ran(size.rows, 0.05 * size.rows)
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[3:]) == 4
    assert sizes[3:].count(4) <= len(sizes) / TRY_AFTER


def test_no_rest_outlasts_the_time_of_an_explanation() -> None:
    explaining = Explaining(last_prediction=math.inf)
    until = explaining.clock.now + 0.06
    explaining.turns.begin(until)
    explaining.part(0.05, until)
    assert explaining.clock.now == pytest.approx(until)
