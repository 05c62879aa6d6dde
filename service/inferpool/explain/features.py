"""Divides the inputs of a row into features, and makes the rows in which some of them are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np

from inferpool.tensors import Array, Tensors

MOST_FEATURES: Final = 256
"""Features of a row. What has more elements is divided into blocks, and pictures into larger patches."""
USUAL_PATCHES: Final = 8
"""Patches along each side of a picture, if the request does not say how large they are."""
FIXED: Final = -1
"""The feature of an element that always keeps its value."""


class VariedInput(NamedTuple):
    """One input of a row.

    Attributes:
        own: its values in the request, of any shape.
        baseline: what replaces them: `[baselines, …]`.
        features: the number of each element's feature, or `FIXED`; broadcast to the shape of `own`.
    """

    own: Array
    baseline: Array
    features: Array


def perturbed_rows(inputs: Mapping[str, VariedInput], masks: Array) -> Tensors:
    """Return the rows in which the features that `masks` leaves out have the values of the baseline.

    `masks` is BOOL `[coalitions, features]`. The rows are `[coalitions * baselines, …]`: a coalition
    has one for each baseline, and they are neighbours.
    """
    kept = np.ones((len(masks), masks.shape[1] + 1), np.bool_)
    kept[:, :-1] = masks  # `FIXED` finds the last column
    rows = {}
    for name, each in inputs.items():
        chosen = np.where(kept[:, each.features][:, None], each.own, each.baseline[None])
        rows[name] = chosen.reshape(len(masks) * len(each.baseline), *each.own.shape)
    return rows


def blocks(elements: int, most: int) -> Array:
    """Return the number of each element's block: neighbours, in at most `most` blocks of equal size."""
    size = -(-elements // max(1, most))
    return np.arange(elements) // max(1, size)


def patches(height: int, width: int, side: int) -> Array:
    """Return the number of the patch of each pixel, `[height, width]`; a patch has `side` pixels a side."""
    across = -(-width // side)
    numbers: Array = (np.arange(height) // side)[:, None] * across + np.arange(width) // side
    return numbers


def usual_side(height: int, width: int) -> int:
    """Return the side of a patch in pixels, if the request does not say."""
    return max(1, -(-max(height, width) // USUAL_PATCHES))
