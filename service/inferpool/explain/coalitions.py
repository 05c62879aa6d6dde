"""The coalitions that KernelSHAP evaluates: sets of features that keep the values of the request.

All coalitions of a size and of its complement are a stratum. Its weight is the sum of their Shapley kernels,
and every coalition that is evaluated counts for an equal part of it. Strata are enumerated from the outside,
where the weights are largest, as far as the passes suffice; the others are sampled. A coalition and its
complement are always neighbours: what the model does symmetrically then cancels out.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Final, NamedTuple

import numpy as np

from inferpool.tensors import Array

_MOST_LISTED: Final = 1 << 17
"""Pairs of a stratum whose coalitions are listed: a list of them takes 100 bytes for each."""
_ENUMERATED_SHARE: Final = 0.125
"""From this share of a stratum on, its coalitions are listed, and none of them is drawn twice."""


class Coalitions(NamedTuple):
    """Coalitions in pairs: each is followed by its complement.

    Attributes:
        masks: BOOL `[coalitions, features]`: which features keep their values.
        strata: the stratum of each coalition: the smaller of its size and that of its complement.
    """

    masks: Array
    strata: Array


def pairs_in(features: int, stratum: int) -> int:
    """Return how many pairs of coalitions a stratum has."""
    coalitions = comb(features, stratum)
    return coalitions // 2 if 2 * stratum == features else coalitions


def kernel_weight(features: int, stratum: int) -> float:
    """Return the sum of the Shapley kernels of all coalitions of a stratum."""
    weight = (features - 1) / (stratum * (features - stratum))
    return weight if 2 * stratum == features else 2 * weight


def is_enumerated(pairs: int, size: int) -> bool:
    """Return whether `pairs` of the `size` pairs of a stratum are all different."""
    return size <= _MOST_LISTED and pairs >= _ENUMERATED_SHARE * size


def all_coalitions(features: int) -> int:
    """Return how many coalitions there are beside the empty one and that of all features."""
    return (1 << features) - 2


def choose(features: int, most: int, rng: np.random.Generator) -> Coalitions:
    """Return at most `most` coalitions of at least two features, all there are if they suffice.

    The coalitions of one feature and their complements come first. The others are mixed, so that the first
    of them are a sample as well, if time runs out.
    """
    strata = range(1, features // 2 + 1)
    counts = _allot(features, most // 2, strata)
    blocks, numbers = [], []
    for stratum, count in zip(strata, counts, strict=True):
        if count:
            blocks.append(_members(features, stratum, count, rng))
            numbers.append(np.full(count, stratum))
    kept, number = np.concatenate(blocks), np.concatenate(numbers)
    first = int(np.count_nonzero(number == 1))
    order = np.concatenate([np.arange(first), first + rng.permutation(len(kept) - first)])
    kept, number = kept[order], number[order]
    masks = np.stack([kept, ~kept], axis=1).reshape(-1, features)
    return Coalitions(masks, np.repeat(number, 2))


def _allot(features: int, pairs: int, strata: range) -> list[int]:
    """Return how many pairs each of `strata` gets: by weight, and never more than it has."""
    counts = []
    left, weight_left = pairs, sum(kernel_weight(features, stratum) for stratum in strata)
    for position, stratum in enumerate(strata):
        weight = kernel_weight(features, stratum)
        size = pairs_in(features, stratum)
        share = round(left * weight / weight_left) if weight_left > 0 else left
        if stratum == 1:
            share = max(share, size)  # without them, features could not be told apart
        # A stratum that is left out would count for nothing, so each gets a pair while there are enough.
        share = max(share, 1) if left >= len(strata) - position else share
        count = min(share, size, left)
        counts.append(count)
        left -= count
        weight_left -= weight
    return counts


def _members(features: int, stratum: int, count: int, rng: np.random.Generator) -> Array:
    """Return `count` coalitions of `stratum` features: all of them, or a sample."""
    size = pairs_in(features, stratum)
    if is_enumerated(count, size):
        chosen = np.array(list(combinations(range(features), stratum)), np.intp)[:size]
        if count < size:
            chosen = chosen[rng.choice(size, count, replace=False)]
        masks = np.zeros((count, features), np.bool_)
        masks[np.arange(count)[:, None], chosen] = True
        return masks
    masks = np.zeros((count, features), np.bool_)
    masks[:, :stratum] = True
    mixed: Array = rng.permuted(masks, axis=1)
    return mixed
