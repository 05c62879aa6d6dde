"""Compares the outputs of two runs row by row, within the rounding of their datatypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from inferpool.errors import Reason
from inferpool.tensors import ROUNDING, Array, Signature, Tensors, bf16_to_fp32, shape_text

_ALIKE: Final = 4.0
"""Rows whose largest numbers differ by at most this factor have terms of about the same size."""
_LEAST_SHARE: Final = 0.01
"""The scale of a column is at least this share of its row's, because columns add terms of one another."""


_MOST_AT_ONCE: Final = 1 << 20
"""Numbers that are compared at a time, so that a comparison takes little memory."""

READ_SLACK: Final = 5.0
"""The slack for a model whose graph mixes no rows: what differs is rounding, in kernels chosen by batch size.

Fifty convolutions in FP16 were seen to differ by 0.03 of the scale on an H200, where 0.02 is the usual
tolerance. A batch that was put together wrongly differs by about the scale itself.
"""


class Comparison(NamedTuple):
    """The result of a comparison.

    Attributes:
        fault: how the outputs differ by more than rounding explains; None if they do not.
        difference: the largest relative difference among the numbers.
    """

    fault: Reason | None
    difference: float


def compare_outputs(
    signature: Signature,
    outputs: Tensors,
    alone: Tensors,
    rows: Sequence[int],
    rounding: str = "",
    magnitudes: Array | None = None,
    slack: float = 1.0,
) -> Comparison:
    """Compare `outputs` of a run of `rows` with the outputs of each row `alone`.

    `rows` are indexes into the first dimension of `alone`. `rounding` is the datatype that the model rounds
    its sums to, if that is coarser than the outputs' own datatypes. `magnitudes` are those of the inputs of
    each row of `alone` (`input_magnitudes`); None if all rows are of about the same size. `slack` multiplies
    the tolerance.
    """
    worst = 0.0
    for name, got in outputs.items():
        reference = alone[name]
        want = reference[list(rows)]
        if not isinstance(got, np.ndarray) or got.shape != want.shape:
            shape = shape_text(got.shape) if isinstance(got, np.ndarray) else "no tensor"
            return Comparison(f'output "{name}" is {shape}, not {shape_text(want.shape)},', worst)
        datatype = signature.outputs_by_name[name].datatype
        tolerance = ROUNDING.get(datatype)
        if tolerance is None:
            if not np.array_equal(got, want):
                return Comparison(f'output "{name}" differs', worst)
            continue
        if datatype == "BF16":
            got, want, reference = (bf16_to_fp32(bits) for bits in (got, want, reference))
        tolerance = slack * max(tolerance, ROUNDING.get(rounding, 0.0))
        difference = relative_difference(got, want, output_scale(reference, magnitudes)[list(rows)])
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


def relative_difference(got: Array, want: Array, scale: Array) -> float:
    """The largest difference of `got` from `want`, relative to `scale`, which is broadcast to their shape.

    NaN equals NaN. The result is infinite if only one of two numbers is finite, or if infinities differ.
    """
    if not want.ndim:
        got, want = np.atleast_1d(got), np.atleast_1d(want)
    scale = np.broadcast_to(scale, (len(want), *scale.shape[1:]))
    worst = 0.0
    for rows in _slices(want):
        wide, expected = got[rows].astype(np.float64), want[rows].astype(np.float64)
        finite = np.isfinite(expected)
        if (
            not np.array_equal(wide[~finite], expected[~finite], equal_nan=True)
            or not np.isfinite(wide[finite]).all()
        ):
            return float("inf")
        gap = np.abs(np.where(finite, wide, 0.0) - np.where(finite, expected, 0.0))
        unit = np.where(scale[rows] > 0, scale[rows], 1.0)
        worst = max(worst, float(np.max(gap / unit, initial=0.0)))
    return worst


def output_scale(reference: Array, magnitudes: Array | None = None) -> Array:
    """How large the terms are that each number of `reference` is a sum of, for the rows along its first axis.

    A runtime may add the terms of a sum in another order in another batch size, which changes the last digits
    of its largest terms, however small the sum is. The terms are not known. They are estimated by the largest
    number of the row, and of rows whose inputs are about as large (all rows, without `magnitudes`), because a
    single sum may happen to be small. A row that is small beside others is compared by its own scale: the
    scale of larger rows would hide what they change in the row.

    Each column has its share of that scale, because a score may stand beside a coordinate of thousands. The
    result has the rank of `reference`, at least 1, and the size 1 in every dimension but the first and last.
    """
    reference = np.atleast_1d(reference)
    if not reference.size:
        return np.zeros((len(reference), *(1,) * (reference.ndim - 1)))
    each = np.zeros(len(reference))
    columns = np.zeros(reference.shape[-1:] if reference.ndim > 1 else 1)
    for rows in _slices(reference):
        numbers = _finite_sizes(reference[rows])
        each[rows] = largest = numbers.reshape(len(numbers), -1).max(axis=1)
        shares = numbers / _by_row(np.where(largest > 0, largest, 1.0), numbers.ndim)
        if reference.ndim > 1:
            columns = np.maximum(columns, shares.max(axis=tuple(range(reference.ndim - 1))))
    if magnitudes is None:
        sizes = np.full(len(each), each.max())
    else:
        alike = (magnitudes[:, None] <= _ALIKE * magnitudes) & (magnitudes <= _ALIKE * magnitudes[:, None])
        sizes = np.where(alike, each, 0.0).max(axis=1)
    if reference.ndim == 1:
        return sizes
    scale: Array = _by_row(sizes, reference.ndim) * np.maximum(columns, _LEAST_SHARE)
    return scale


def input_magnitudes(signature: Signature, rows: Tensors) -> Array:
    """The largest finite number of each row among its inputs of numbers; 0 if it has none."""
    count = len(next(iter(rows.values())))
    largest = np.zeros(count)
    for name, tensor in rows.items():
        if tensor.dtype.kind in "fiu" and tensor.size:
            bits = signature.inputs_by_name[name].datatype == "BF16"
            numbers = _finite_sizes(bf16_to_fp32(tensor) if bits else tensor)
            largest = np.maximum(largest, numbers.reshape(count, -1).max(axis=1))
    return largest


def _finite_sizes(tensor: Array) -> Array:
    """The sizes of numbers, 0 for those that are not finite."""
    numbers: Array = np.abs(tensor.astype(np.float64))
    numbers[~np.isfinite(numbers)] = 0.0
    return numbers


def _by_row(values: Array, rank: int) -> Array:
    """One number a row, as a tensor of rank `rank`."""
    return values.reshape(len(values), *(1,) * (rank - 1))


def _slices(tensor: Array) -> Iterator[slice]:
    """The rows of a tensor, as many at a time as are cheap to copy."""
    count = max(1, _MOST_AT_ONCE // max(1, tensor.size // max(1, len(tensor))))
    for start in range(0, len(tensor), count):
        yield slice(start, start + count)
