"""Outputs are compared row by row: reordered sums are rounding, and what a row takes from others is not."""

from __future__ import annotations

import numpy as np
import pytest
from inferpool.repository.load.comparison import (
    compare_outputs,
    input_magnitudes,
    output_scale,
    relative_difference,
)
from inferpool.tensors import Signature, TensorSpec, fp32_to_bf16


def signature(datatype: str = "FP32") -> Signature:
    return Signature((TensorSpec("x", datatype, (-1, 2)),), (TensorSpec("y", datatype, (-1, 2)),))


def fault_of(got: np.ndarray, want: np.ndarray, magnitudes: np.ndarray | None = None) -> str | None:
    return compare_outputs(signature(), {"y": got}, {"y": want}, range(len(want)), "", magnitudes).fault


HUGE_BESIDE_SMALL = np.array([[1e6, -2e6], [0.5, 0.25]], np.float32)


def test_a_huge_row_does_not_hide_what_changes_in_a_small_one() -> None:
    got = HUGE_BESIDE_SMALL + np.array([[0, 0], [1e-2, 0]], np.float32)
    sizes = input_magnitudes(signature(), {"x": HUGE_BESIDE_SMALL})
    assert sizes.tolist() == [2e6, 0.5]
    assert fault_of(got, HUGE_BESIDE_SMALL, sizes) is not None
    assert fault_of(HUGE_BESIDE_SMALL, HUGE_BESIDE_SMALL, sizes) is None


def test_the_rounding_of_a_sum_is_that_of_its_terms() -> None:
    """A sum that happens to be small is compared by the scale of rows whose inputs are about as large."""
    want = np.array([[1e-6], [3.0]], np.float32)
    got = want + np.float32(1e-6)
    assert fault_of(got, want, np.array([1.0, 2.0])) is None
    assert fault_of(got, want, np.array([1.0, 20.0])) is not None


def test_a_score_beside_a_coordinate_has_a_scale_of_its_own() -> None:
    want = np.array([[900.0, 0.7], [700.0, 0.2]], np.float32)
    assert fault_of(want + np.array([[0, 0.05], [0, 0]], np.float32), want) is not None
    assert fault_of(want * np.float32(1 + 1e-6), want) is None


@pytest.mark.parametrize(
    ("got", "same"),
    [
        ([np.nan, 1.0], True),
        ([0.0, 1.0], False),
        ([np.nan, np.nan], False),
        ([np.inf, 1.0], False),
    ],
)
def test_nan_equals_nan_and_nothing_else(got: list[float], same: bool) -> None:
    want = np.array([[np.nan, 1.0]], np.float32)
    assert (fault_of(np.array([got], np.float32), want) is None) is same


def test_bf16_is_compared_as_numbers_not_as_bits() -> None:
    want = fp32_to_bf16(np.array([[1.0, -4e-4]], np.float32))
    got = fp32_to_bf16(np.array([[1.0, 4e-4]], np.float32))
    assert compare_outputs(signature("BF16"), {"y": got}, {"y": want}, [0]).fault is None
    wrong = fp32_to_bf16(np.array([[1.5, -4e-4]], np.float32))
    assert compare_outputs(signature("BF16"), {"y": wrong}, {"y": want}, [0]).fault is not None


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (3, 0), (2, 3, 4)])
def test_outputs_of_any_rank(shape: tuple[int, ...]) -> None:
    want = np.ones(shape, np.float32)
    assert relative_difference(want, want, output_scale(want)) == 0
    if want.size:
        assert relative_difference(want + 1, want, output_scale(want)) == pytest.approx(1)


def test_large_outputs_are_compared_in_parts() -> None:
    want = np.random.default_rng(1).standard_normal((5, 600_000)).astype(np.float32)
    got = want.copy()
    got[4, -1] += 1
    assert fault_of(want, want) is None
    assert fault_of(got, want) is not None
