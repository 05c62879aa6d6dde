"""The cost of a row by its elements."""

from __future__ import annotations

import pytest
from inferpool.pool.row_cost import CostPoint, RowCost

COST = RowCost((CostPoint(100, 1e-4, 1.0), CostPoint(400, 4e-4, 4.0), CostPoint(1600, 64e-4, 64.0)), 0.5)


@pytest.mark.parametrize(
    ("elements", "load"),
    [(1, 1.0), (100, 1.0), (200, 2.0), (400, 4.0), (800, 16.0), (1600, 64.0), (3200, 256.0)],
)
def test_between_measured_sizes_and_above_them_the_cost_follows_a_power(elements: int, load: float) -> None:
    assert COST.load(elements) == pytest.approx(load)


def test_above_the_largest_size_the_cost_grows_at_least_like_the_elements_and_at_most_like_their_square() -> (
    None
):
    flat = RowCost((CostPoint(100, 1e-4, 1.0), CostPoint(400, 1e-4, 1.0)))
    assert flat.growth == 1.0
    assert flat.load(800) == pytest.approx(2.0)
    steep = RowCost((CostPoint(100, 1e-4, 1.0), CostPoint(200, 1.0, 1000.0)))
    assert steep.growth == 2.0
    assert steep.load(400) == pytest.approx(4000.0)
    assert RowCost((CostPoint(100, 0.0, 1.0),)).load(1000) == pytest.approx(10.0)


def test_no_row_costs_less_than_the_least() -> None:
    small = RowCost((CostPoint(10, 1e-6, 0.01), CostPoint(1000, 1e-4, 1.0)), least=0.25)
    assert small.load(10) == 0.25
    assert small.load(1000) == 1.0
