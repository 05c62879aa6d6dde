"""Distances between the reference and what was counted: PSI, Kolmogorov-Smirnov, Jensen-Shannon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

FLOOR: Final = 1e-3
"""The least share of a bin for the PSI: a bin without rows would make it infinite."""


class Distances(NamedTuple):
    """How far counts are from a reference.

    Attributes:
        psi: population stability index; above 0.25 by custom, the distribution has changed.
        ks: the largest difference of the cumulated shares, 0 to 1; None for categories, which have no order.
        js: the Jensen-Shannon distance with logarithms to base 2, 0 to 1.
    """

    psi: float
    ks: float | None
    js: float


def distances(reference: Sequence[float], counts: Sequence[float], *, ordered: bool) -> Distances:
    """The distances of `counts` from the shares of the `reference`, cell by cell.

    Of `ordered` cells the last one has what is missing, and no place in the order. Counts below 0, which
    noise can make, count as 0. There must be a count above 0.
    """
    positive = [max(0.0, count) for count in counts]
    total = sum(positive)
    shares = [count / total for count in positive]
    psi = 0.0
    for expected, found in zip(reference, shares, strict=True):
        p, q = max(expected, FLOOR), max(found, FLOOR)
        psi += (q - p) * math.log(q / p)
    js = 0.0
    for expected, found in zip(reference, shares, strict=True):
        middle = (expected + found) / 2
        for share in (expected, found):
            if share > 0:
                js += share / 2 * math.log2(share / middle)
    ks = None
    if ordered:
        apart, ks = 0.0, abs(reference[-1] - shares[-1])
        for expected, found in zip(reference[:-1], shares[:-1], strict=True):
            apart += found - expected
            ks = max(ks, abs(apart))
    return Distances(psi, ks, math.sqrt(max(0.0, js)))
