"""Estimates what each feature contributes to a number that a model answers.

A feature is a column, a word or a patch of a picture. A coalition is a set of features that keep the values
of the request, while the others have those of the baseline. Every estimator asks a function for the model's
numbers for coalitions; where the function stops early, because its time is up, the estimate is made of the
numbers there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from inferpool.explain.coalitions import (
    Coalitions,
    all_coalitions,
    choose,
    is_enumerated,
    kernel_weight,
    pairs_in,
)
from inferpool.tensors import Array

Evaluate: TypeAlias = Callable[[Array], Array]
"""The numbers FP64 `[n]` of the coalitions BOOL `[n, features]`; those of the first if it has to end."""

KERNEL: Final = "kernel"
PERMUTATION: Final = "permutation"
OCCLUSION: Final = "occlusion"
METHODS: Final = (KERNEL, PERMUTATION, OCCLUSION)

_MOST_KEPT: Final = 8
"""Designs that are kept for the next explanation."""
_MOST_KEPT_ELEMENTS: Final = 1 << 17
"""Designs of more elements, coalitions times features, are not kept; one of so many takes a megabyte."""


class TooFewPasses(Exception):
    """The passes that could be run are too few for an estimate: `needed` is the least number."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed} passes are needed")
        self.needed = needed


class Estimate(NamedTuple):
    """What each feature contributes.

    Attributes:
        contributions: FP64 `[features]`.
        standard_errors: of the contributions, by sampling; 0 if nothing was sampled, NaN if not known.
        exact: whether nothing was sampled.
        complete: whether all coalitions that were asked for were evaluated.
    """

    contributions: Array
    standard_errors: Array
    exact: bool
    complete: bool


def least_coalitions(method: str, features: int) -> int:
    """Return how many coalitions a method needs at least."""
    if method == OCCLUSION:
        return features
    if features < 2:
        return 0
    return 2 * features if method == KERNEL and features > 2 else 2 * (features - 1)


def estimate(
    method: str, base: float, value: float, features: int, most: int, seed: int, evaluate: Evaluate
) -> Estimate:
    """Estimate the contributions of `features` to the step from `base` to `value`, by one of `METHODS`.

    `base` is the number with the baseline alone, `value` that of the request. At most `most` coalitions are
    evaluated. Raises TooFewPasses.
    """
    needed = least_coalitions(method, features)
    if most < needed:
        raise TooFewPasses(needed)
    if method == OCCLUSION:
        return _occlusion(value, features, evaluate)
    if features == 1:
        return Estimate(np.array([value - base]), np.zeros(1), exact=True, complete=True)
    # With few features, all coalitions give the exact values, and cost no more.
    if method == KERNEL or all_coalitions(features) <= most:
        return _kernel(base, value, features, most, seed, evaluate)
    return _permutation(base, value, features, most, np.random.default_rng(seed), evaluate)


def _occlusion(value: float, features: int, evaluate: Evaluate) -> Estimate:
    """Return how much the number falls without each feature. The sum of these need not be the whole step."""
    found = evaluate(~np.eye(features, dtype=np.bool_))
    if len(found) < features:
        raise TooFewPasses(features)
    return Estimate(value - found, np.zeros(features), exact=True, complete=True)


def _permutation(
    base: float, value: float, features: int, most: int, rng: np.random.Generator, evaluate: Evaluate
) -> Estimate:
    """Average what features add when they are put in, one after the other, in random orders.

    Each order is followed by its reverse, which halves the errors of what pairs of features do together.
    """
    steps = features - 1
    pairs = most // (2 * steps)
    ranks = np.argsort(rng.random((pairs, features)), axis=1)
    ranks = np.stack([ranks, steps - ranks], axis=1).reshape(-1, features)
    masks = (ranks[:, None, :] < np.arange(1, features)[:, None]).reshape(-1, features)
    found = evaluate(masks)
    ended = len(found) // (2 * steps)
    if not ended:
        raise TooFewPasses(2 * steps)
    path = np.empty((2 * ended, features + 1))
    path[:, 0], path[:, -1] = base, value
    path[:, 1:-1] = found[: 2 * ended * steps].reshape(2 * ended, steps)
    added = np.take_along_axis(np.diff(path, axis=1), ranks[: 2 * ended], axis=1)
    of_pairs = added.reshape(ended, 2, features).mean(axis=1)
    errors = np.full(features, np.nan)
    if ended > 1:
        errors = of_pairs.std(axis=0, ddof=1) / np.sqrt(ended)
    return Estimate(of_pairs.mean(axis=0), errors, exact=False, complete=ended == pairs)


def _kernel(base: float, value: float, features: int, most: int, seed: int, evaluate: Evaluate) -> Estimate:
    """Fit the additive model that KernelSHAP defines; its coefficients are the Shapley values."""
    is_small = features * most <= _MOST_KEPT_ELEMENTS
    design = (_kept_design if is_small else _new_design)(features, most, seed)
    masks, strata = design.chosen
    found = evaluate(masks)
    count = len(found) // 2 * 2
    needed = least_coalitions(KERNEL, features)
    if count < needed:
        raise TooFewPasses(needed)
    complete = count == len(masks) == len(found)
    if count < len(masks):
        design = _design_of(Coalitions(masks[:count], strata[:count]))
    contributions, errors = _fit(design, found[:count] - base, value - base)
    return Estimate(contributions, errors, count == all_coalitions(features), complete=complete)


class _Design(NamedTuple):
    """What the fit of some coalitions needs and no output changes.

    A coalition and its complement weigh the same, so only the difference of the two matters: a row of the fit
    is a pair, with 1/2 for a feature that the first of the two keeps, and -1/2 for the others.

    Attributes:
        chosen: the coalitions.
        rows: the pairs, `[pairs, features]`.
        weighted: the rows, times the weight of each.
        inverse: that of the products of the rows, `[features, features]`.
        numbers: the strata that there are.
        number_at: the index in `numbers` of the stratum of each row.
        counts: how many rows each stratum has.
        members: which rows each stratum has, 1 or 0, `[strata, pairs]`.
        spread: what the square of a deviation in each stratum counts for; 0 if nothing was sampled.
    """

    chosen: Coalitions
    rows: Array
    weighted: Array
    inverse: Array
    numbers: Array
    number_at: Array
    counts: Array
    members: Array
    spread: Array


def _new_design(features: int, most: int, seed: int) -> _Design:
    return _design_of(choose(features, most, np.random.default_rng(seed)))


_kept_design = lru_cache(_MOST_KEPT)(_new_design)
"""Most requests ask for as many passes as the one before, with the same seed.

Making the coalitions takes as long as running them does in a small model.
"""


def _design_of(chosen: Coalitions) -> _Design:
    rows = chosen.masks[0::2] - 0.5
    features = rows.shape[1]
    numbers, number_at = np.unique(chosen.strata[0::2], return_inverse=True)
    counts = np.bincount(number_at)
    weights = np.array([kernel_weight(features, int(number)) for number in numbers])
    weighted = rows * (weights / counts)[number_at][:, None]
    # Adding the same to all products changes nothing, because the sum of the coefficients is given.
    inverse = np.linalg.inv(weighted.T @ rows + 1.0)
    members = (number_at == np.arange(len(numbers))[:, None]).astype(np.float64)
    spread = np.array(
        [
            _spread(features, number, count)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
    )
    return _Design(chosen, rows, weighted, inverse, numbers, number_at, counts, members, spread)


def _spread(features: int, stratum: int, count: int) -> float:
    """Return the factor from squares of deviations in a stratum to the variance of what `count` pairs add."""
    size = pairs_in(features, stratum)
    if count >= size:
        return 0.0
    left_over = 1 - count / size if is_enumerated(count, size) else 1.0
    return left_over * count / (count - 1) if count > 1 else left_over


def _fit(design: _Design, gains: Array, step: float) -> tuple[Array, Array]:
    """Return coefficients whose sum is `step`, and their standard errors, from the `gains` of coalitions."""
    rows, weighted, inverse = design.rows, design.weighted, design.inverse
    number_at, counts = design.number_at, design.counts
    halves = (gains[0::2] - gains[1::2]) / 2
    pairs, features = rows.shape
    pull = inverse.sum(axis=1)
    free = inverse @ (halves @ weighted)
    fitted = free + pull * ((step - free.sum()) / pull.sum())
    # What each pair of a sampled stratum moves the coefficients by; its scatter is that of the sampling.
    projection = inverse - np.outer(pull, pull) / pull.sum()
    moves = (weighted * (halves - rows @ fitted)[:, None]) @ projection
    # A stratum of one pair has no scatter of its own: its whole move counts.
    means = np.where(counts[:, None] > 1, (design.members @ moves) / counts[:, None], 0.0)
    variance: Array = ((moves - means[number_at]) ** 2 * design.spread[number_at][:, None]).sum(axis=0)
    # The fit follows what was sampled, so its residuals are too small.
    if pairs >= features:
        variance *= pairs / (pairs - features + 1)
    return fitted, np.sqrt(variance)
