"""The latency model as pure maths: what it expects, and how sure it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.pool.latency_model import OUTLIER, LatencyModel, Measurement

TABLES = st.lists(
    st.builds(Measurement, st.integers(1, 512), st.floats(1e-5, 1.0), st.integers(1, 100)), max_size=8
)


@given(TABLES, st.floats(1, 600), st.floats(0, 600))
def test_a_larger_batch_is_never_expected_to_be_quicker(
    table: list[Measurement], rows: float, more: float
) -> None:
    model = LatencyModel(table)
    assert model.seconds(rows) <= model.seconds(rows + more) * (1 + 1e-9)


def test_nothing_is_expected_before_the_first_measurement() -> None:
    model = LatencyModel()
    assert (model.seconds(4), model.runs(4), model.table()) == (0.0, 0, [])


def test_expectations_lie_between_measurements_and_grow_beyond_the_largest() -> None:
    model = LatencyModel([Measurement(4, 0.010, 8), Measurement(8, 0.020, 8)])
    assert model.seconds(1) == 0.010
    assert model.seconds(6) == pytest.approx(0.015)
    assert model.seconds(16) == pytest.approx(0.040)
    assert (model.runs(8), model.runs(100)) == (8, 8)


def test_batches_of_less_than_one_row_have_expectations_of_their_own() -> None:
    model = LatencyModel([Measurement(0.1, 0.001, 8), Measurement(1, 0.010, 8), Measurement(2, 0.020, 8)])
    assert model.seconds(0.1) == 0.001
    assert model.seconds(0.55) == pytest.approx(0.0055)
    for _ in range(100):
        model.observe(0.1, 0.002)
    assert model.seconds(0.1) == pytest.approx(0.002, rel=0.01)
    assert model.seconds(1) == 0.010


def test_one_run_that_was_held_up_counts_as_an_outlier() -> None:
    model = LatencyModel([Measurement(4, 0.010, 100)])
    model.observe(4, 10.0)
    assert model.seconds(4) == pytest.approx(0.010 * (1 + 0.1 * (OUTLIER - 1)))


def test_a_lasting_change_is_learnt() -> None:
    model = LatencyModel([Measurement(4, 0.010, 100)])
    for _ in range(100):
        model.observe(4, 1.0)
    assert model.seconds(4) == pytest.approx(1.0, rel=0.01)


def test_uneven_runs_raise_the_safety_factor() -> None:
    steady, unsteady = LatencyModel(), LatencyModel()
    for run in range(100):
        steady.observe(4, 0.010)
        unsteady.observe(4, 0.005 if run % 2 else 0.015)
    assert steady.safety_factor() < 1.01
    assert 2 < unsteady.safety_factor() < 4


def test_batches_of_many_sizes_and_a_steady_cost_leave_the_safety_factor_low() -> None:
    model = LatencyModel(Measurement(2**power, 0.001 * 2**power, 8) for power in range(9))
    for run in range(200):
        rows = 129 if run % 2 else 256
        model.observe(rows, 0.001 * rows)
    assert model.safety_factor() < 1.01
