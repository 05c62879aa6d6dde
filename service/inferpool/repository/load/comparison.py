"""Compares the outputs of two runs, within the rounding of their datatypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inferpool.errors import Reason
from inferpool.tensors import ROUNDING, Array, Signature, Tensors, shape_text


class Comparison(NamedTuple):
    """The result of a comparison.

    Attributes:
        fault: how the outputs differ by more than rounding explains; None if they do not.
        difference: the largest relative difference among the numbers.
    """

    fault: Reason | None
    difference: float


def compare_outputs(
    signature: Signature, outputs: Tensors, alone: Tensors, rows: Sequence[int], rounding: str = ""
) -> Comparison:
    """Compare `outputs` of a run of `rows` with the outputs of each row `alone`.

    `rows` are indexes into the first dimension of `alone`. `rounding` is the datatype that the model rounds
    its sums to, if that is coarser than the outputs' own datatypes.
    """
    worst = 0.0
    for name, got in outputs.items():
        reference = alone[name]
        want = reference[list(rows)]
        if not isinstance(got, np.ndarray) or got.shape != want.shape:
            shape = shape_text(got.shape) if isinstance(got, np.ndarray) else "no tensor"
            return Comparison(f'output "{name}" is {shape}, not {shape_text(want.shape)},', worst)
        tolerance = ROUNDING.get(signature.outputs_by_name[name].datatype)
        if tolerance is None:
            if not np.array_equal(got, want):
                return Comparison(f'output "{name}" differs', worst)
            continue
        tolerance = max(tolerance, ROUNDING.get(rounding, 0.0))
        difference = relative_difference(got, want, reference)
        if not difference <= tolerance:
            fault = f'output "{name}" differs by {difference:.1g} (rounding explains {tolerance:.0e})'
            return Comparison(fault, worst)
        worst = max(worst, difference)
    return Comparison(None, worst)


def compare_answers(
    signature: Signature, answer: Tensors, alone: Tensors, others: Sequence[Tensors], rounding: str = ""
) -> Reason | None:
    """How `answer` differs from the answer to the same rows `alone`; None if rounding explains it.

    The outputs of `others`, which are answers to other rows, give the scale of each number, as far as they
    have the same shape. `rounding` is as in `compare_outputs`.
    """
    rows = 0
    for name, tensor in alone.items():
        rows = len(tensor)
        if answer[name].shape != tensor.shape:
            return f'output "{name}" is {shape_text(answer[name].shape)}, not {shape_text(tensor.shape)},'
    usable = [
        other
        for other in others
        if all(name in other and other[name].shape[1:] == tensor.shape[1:] for name, tensor in alone.items())
    ]
    reference = {
        name: np.concatenate([tensor, *(other[name] for other in usable)]) for name, tensor in alone.items()
    }
    return compare_outputs(signature, answer, reference, range(rows), rounding).fault


def relative_difference(got: Array, want: Array, reference: Array) -> float:
    """The largest difference of `got` from `want`, relative to the scale of `reference`.

    `reference` includes the rows of `want`. The result is infinite if only one of the two is finite.
    """
    if not want.size:
        return 0.0
    wide, expected = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(expected)
    if (
        not np.array_equal(wide[~finite], expected[~finite], equal_nan=True)
        or not np.isfinite(wide[finite]).all()
    ):
        return float("inf")
    # Each column has its own scale, because a score may stand beside a coordinate of thousands. The scale is
    # at least a hundredth of the output's, because a small sum of large terms is as uncertain as its terms.
    sizes = np.where(np.isfinite(reference), np.abs(reference.astype(np.float64)), 0.0)
    columns = sizes.max(axis=tuple(range(sizes.ndim - 1))) if sizes.ndim > 1 else sizes.max()
    scale = np.maximum(columns, sizes.max() / 100)
    gap = np.where(finite, np.abs(np.where(finite, wide, 0.0) - np.where(finite, expected, 0.0)), 0.0)
    return float(np.max(gap / np.where(scale > 0, scale, 1.0)))
