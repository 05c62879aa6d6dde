"""The cost of rows of several sizes is fitted to timed runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inferpool.pool.latency_model import LatencyModel
from inferpool.repository.load.plan import Plan, PlanConstraints
from inferpool.repository.load.planner import Planner
from inferpool.tensors import Tensors

from tests.repository.load.function_model import Clock, FunctionModel

START_S, ELEMENT_S = 1e-4, 1e-6
"""The seconds of a run of the model below: in any case, and for each element."""

SIZES = (-1, 3, -1, -1)


def planned(
    seconds_of: Callable[[np.ndarray], float] = lambda x: START_S + ELEMENT_S * x.size,
    shape: tuple[int, ...] = SIZES,
    samples: list[Tensors] | None = None,
    function: Callable[[np.ndarray], Any] = lambda x: x.reshape(len(x), -1)[:, :1],
    **constraints: Any,
) -> Plan:
    """The plan of a model whose runs take what `seconds_of` says, by a clock that only they advance."""
    clock = Clock()

    def run(x: np.ndarray) -> np.ndarray:
        clock.advance(seconds_of(x))
        return np.asarray(function(x))

    model = FunctionModel(run, shape)
    limits = PlanConstraints(**({"cores": 1, "budget_s": 4.0} | constraints))
    return Planner(lambda threads: model, limits, clock).make(model, samples or [])


def test_a_large_picture_is_expected_to_take_as_long_as_it_does() -> None:
    plan = planned()
    assert plan.batched
    assert plan.row_cost is not None
    expected = LatencyModel(plan.table)
    for side in (16, 32, 100, 256, 400):
        elements = 3 * side * side
        alone = expected.seconds(plan.row_cost.load(elements))
        assert alone == pytest.approx(START_S + ELEMENT_S * elements, rel=0.2), side


def test_a_batch_of_large_pictures_has_no_more_elements_than_one_of_small_pictures() -> None:
    plan = planned()
    assert plan.row_cost is not None
    of_16 = plan.max_rows / plan.row_cost.load(3 * 16 * 16)
    of_64 = plan.max_rows / plan.row_cost.load(3 * 64 * 64)
    assert of_64 * 64 * 64 <= 1.3 * of_16 * 16 * 16


def test_rows_smaller_than_the_samples_cost_less_and_are_still_bounded() -> None:
    sample = {"x": np.random.default_rng(1).standard_normal((1, 3, 256, 256)).astype(np.float32)}
    plan = planned(samples=[sample])
    assert plan.row_cost is not None
    assert plan.row_cost.load(3 * 256 * 256) == pytest.approx(1.0)
    assert plan.row_cost.load(3 * 64 * 64) == pytest.approx(1 / 16, rel=0.1)
    assert plan.max_rows / plan.row_cost.load(1) <= 256
    limited = planned(samples=[sample], max_rows=4)
    assert limited.row_cost is not None
    assert limited.row_cost.load(3 * 64 * 64) == 1.0


def test_a_square_cost_is_found() -> None:
    plan = planned(lambda x: START_S + 1e-8 * len(x) * x.shape[1] ** 2, (-1, -1))
    assert plan.row_cost is not None
    assert plan.row_cost.growth == pytest.approx(2.0, rel=0.1)


def test_rows_of_one_size_have_no_cost_of_their_own() -> None:
    assert planned(shape=(-1, 4)).row_cost is None
    assert planned(weighed=False).row_cost is None


def test_only_dimensions_that_the_model_lets_grow_are_measured() -> None:
    def three_channels(x: np.ndarray) -> np.ndarray:
        if x.shape[1] != 16:
            raise ValueError("16 channels are needed")
        return x.reshape(len(x), -1)[:, :1]

    plan = planned(shape=(-1, -1, -1), function=three_channels)
    assert plan.row_cost is not None
    assert len(plan.row_cost.points) > 3


def test_a_request_of_an_unbatched_model_is_weighed_as_a_whole() -> None:
    plan = planned(function=lambda x: x.sum(keepdims=True).reshape(1, -1), shape=(-1, 4))
    assert not plan.batched
    assert plan.row_cost is not None
    # Made-up requests have one row of four elements here; a thousand rows cost what they take.
    assert plan.row_cost.load(40_000) == pytest.approx(40_000 * ELEMENT_S / START_S, rel=0.2)


def test_without_measuring_the_cost_is_in_proportion_to_the_elements() -> None:
    plan = planned(budget_s=0.0)
    assert plan.row_cost is not None
    assert plan.row_cost.load(4 * 3 * 16 * 16) == pytest.approx(4.0)


def test_memory_bounds_the_sizes_that_are_tried() -> None:
    largest = 0

    def function(x: np.ndarray) -> np.ndarray:
        nonlocal largest
        largest = max(largest, x.nbytes)
        return x.reshape(len(x), -1)[:, :1]

    planned(lambda x: 1e-6, function=function)
    assert largest <= 16 * 1024 * 1024
