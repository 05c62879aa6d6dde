"""What replaces the features that a coalition leaves out: the baseline, and how it is made for each kind."""

from __future__ import annotations

from typing import Final

import numpy as np

from inferpool.tensors import Array, bf16_to_fp32, fp64_to_bf16

ZEROS: Final = "zeros"
SAMPLES_MEAN: Final = "samples-mean"
SAMPLES: Final = "samples"
MEAN_COLOUR: Final = "mean-colour"
BLUR: Final = "blur"
MASK: Final = "mask"
UNKNOWN: Final = "unknown"
PADDING: Final = "padding"
TOKENS: Final = (MASK, UNKNOWN, PADDING)
"""Tokens that replace those of a word, the best first."""
PICTURES: Final = (MEAN_COLOUR, BLUR)
_BLURRED_SHARE: Final = 8
_BLURS: Final = 3
"""Three means over a window come close to a Gaussian."""


def zeros(own: Array) -> Array:
    """Return one baseline of zeros; of strings, empty ones."""
    empty: Array = np.full((1, *own.shape), "", object) if own.dtype == object else np.zeros_like(own)[None]
    return empty


def mean_row(rows: Array, is_bf16: bool) -> Array:
    """Return one baseline: the mean of `rows`, in their datatype; of strings and flags, the first row."""
    if rows.dtype.kind not in "iuf":
        return rows[:1]
    return as_datatype(as_numbers(rows, is_bf16).mean(axis=0, keepdims=True), rows.dtype, is_bf16)


def mean_colour(own: Array, layout: str, is_bf16: bool) -> Array:
    """Return one baseline: a picture in the mean colour of `own`, whose axes are `layout`."""
    numbers = as_numbers(own, is_bf16)
    mean = numbers.mean(axis=(layout.index("H"), layout.index("W")), keepdims=True)
    return as_datatype(np.broadcast_to(mean, own.shape)[None], own.dtype, is_bf16)


def blurred(own: Array, layout: str, is_bf16: bool) -> Array:
    """Return one baseline: the picture `own`, out of focus, so that shapes larger than an eighth remain."""
    numbers = as_numbers(own, is_bf16)
    for axis in (layout.index("H"), layout.index("W")):
        reach = max(1, own.shape[axis] // _BLURRED_SHARE)
        for _ in range(_BLURS):
            numbers = _window_mean(numbers, axis, reach)
    return as_datatype(numbers[None], own.dtype, is_bf16)


def _window_mean(numbers: Array, axis: int, reach: int) -> Array:
    """Return the mean of each number with `reach` neighbours on both sides; the edges are repeated."""
    widths = [(0, 0)] * numbers.ndim
    widths[axis] = (reach + 1, reach)
    sums = np.cumsum(np.pad(numbers, widths, mode="edge"), axis=axis)
    size = 2 * reach + 1
    length = numbers.shape[axis]
    ends = np.take(sums, np.arange(size, size + length), axis=axis)
    starts = np.take(sums, np.arange(length), axis=axis)
    means: Array = (ends - starts) / size
    return means


def as_numbers(values: Array, is_bf16: bool) -> Array:
    """Return numbers of an input as FP64; `is_bf16` says that they are the bits of BF16."""
    return (bf16_to_fp32(values) if is_bf16 else values).astype(np.float64)


def as_datatype(numbers: Array, dtype: np.dtype[np.generic], is_bf16: bool) -> Array:
    """Return FP64 numbers in the datatype of an input, the nearest ones that it has."""
    if is_bf16:
        return fp64_to_bf16(numbers)
    return (np.rint(numbers) if dtype.kind in "iu" else numbers).astype(dtype)
