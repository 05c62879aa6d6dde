"""Answers are compared within the rounding of their datatypes, on the scale of the same numbers elsewhere."""

from __future__ import annotations

import numpy as np
from inferpool.repository.load.comparison import compare_answers
from inferpool.tensors import Signature, Tensors, TensorSpec

SIGNATURE = Signature((), (TensorSpec("y", "FP32", (-1, -1)), TensorSpec("label", "INT64", (-1,))))


def row(*numbers: float) -> Tensors:
    return {"y": np.array([numbers], np.float32)}


def test_rounding_is_no_difference() -> None:
    assert compare_answers(SIGNATURE, row(1, 2), row(1, 2.00001), []) is None
    found = compare_answers(SIGNATURE, row(1, 2), row(1, 2.01), [])
    assert found == 'output "y" differs by 0.005 (rounding explains 1e-04)'


def test_other_rows_give_the_scale() -> None:
    """A number near zero is as uncertain as the sums of its column in other rows."""
    answer, alone = row(1e-5, 1), row(2e-5, 1)
    assert compare_answers(SIGNATURE, answer, alone, []) is not None
    assert compare_answers(SIGNATURE, answer, alone, [row(3, 1)]) is None
    assert compare_answers(SIGNATURE, answer, alone, [row(3, 1, 4), {}]) is not None, "another shape"


def test_another_shape_is_a_difference() -> None:
    found = compare_answers(SIGNATURE, row(1, 2), row(1, 2, 0), [row(1, 2)])
    assert found == 'output "y" is [1, 2], not [1, 3],'
    two = {"y": np.zeros((2, 2), np.float32)}
    assert compare_answers(SIGNATURE, row(0, 0), two, []) == 'output "y" is [1, 2], not [2, 2],'


def test_integers_must_be_equal() -> None:
    labels = {"label": np.array([3])}
    assert compare_answers(SIGNATURE, labels, {"label": np.array([3])}, [{"label": np.array([9])}]) is None
    assert compare_answers(SIGNATURE, labels, {"label": np.array([4])}, []) == 'output "label" differs'
