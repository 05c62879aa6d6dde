"""Integrated gradients without a model: the points, and when there are more of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.explain.estimators import TooFewPasses
from inferpool.explain.integrated_gradients import PathPoints, integrate, path_points
from inferpool.tensors import Array


@given(st.sampled_from([2, 3, 30, 50, 100, 400]), st.integers(1, 5), st.integers(1, 20))
def test_points_integrate_polynomials_whatever_the_pieces_are(steps: int, baselines: int, size: int) -> None:
    pieces = list(path_points(steps, baselines).pieces(size))
    assert sum(len(piece.positions) for piece in pieces) == steps * baselines
    for power in range(4):
        total = sum(float(piece.weights @ piece.positions**power) for piece in pieces)
        assert total == pytest.approx(1 / (power + 1))
    counts = np.bincount(np.concatenate([piece.baselines for piece in pieces]))
    assert counts.tolist() == [steps] * baselines


def uneven(points: PathPoints) -> Array:
    """The integral of a feature that jumps, from 0 to 1, and of one that does not."""
    return np.array([points.weights @ (100.0 * (abs(points.positions - 0.3) < 0.005)), 2.0])


def test_points_are_doubled_until_the_sum_holds() -> None:
    found, steps = integrate(3.0, 0.1, 1, 10_000, uneven)
    assert (steps > 50, found.complete) == (True, True)
    assert found.contributions.sum() == pytest.approx(3.0, abs=0.1)
    smooth, steps = integrate(2.0, 0.1, 1, 10_000, lambda points: np.array([2.0 * points.weights.sum()]))
    assert (steps, smooth.contributions.tolist()) == (50, pytest.approx([2.0]))


def test_no_more_points_are_run_than_passes_are_left() -> None:
    runs: list[int] = []

    def never(points: PathPoints) -> Array:
        runs.append(len(points.positions))
        return np.zeros(1)

    _, steps = integrate(1.0, 0.01, 2, 400, never)
    assert (runs, steps) == ([100, 200], 100)
    runs.clear()
    _, steps = integrate(1.0, 0.01, 1, 5, never)
    assert (runs, steps) == ([5], 5)
    with pytest.raises(TooFewPasses):
        integrate(1.0, 0.01, 3, 5, never)


def test_the_sums_before_time_was_up_are_the_answer() -> None:
    sums = iter([np.array([0.25]), None])
    found, steps = integrate(1.0, 0.01, 1, 1000, lambda _: next(sums))
    assert (found.contributions.tolist(), found.complete, steps) == ([0.25], False, 50)
    with pytest.raises(TooFewPasses):
        integrate(1.0, 0.01, 1, 1000, lambda _: None)
