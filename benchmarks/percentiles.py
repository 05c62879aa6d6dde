"""Percentiles of times, and how sure the ratio of two of them is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

RESAMPLES = 400


def percentile(values: Sequence[float], part: float) -> float:
    """Return the value that `part` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def pooled(rounds: Sequence[Sequence[float]], part: float) -> float:
    """Return the percentile of all times of all rounds."""
    return percentile([each for times in rounds for each in times], part)


def ratio_interval(
    less: Sequence[Sequence[float]], more: Sequence[Sequence[float]], part: float
) -> tuple[float, float]:
    """Return a 95 % interval of the ratio of two pooled percentiles, of `more` to `less`.

    Source: the percentile bootstrap (Efron 1979). Whole pairs of rounds are drawn, because the times of one
    round depend on one another.
    """
    choose, count = random.Random(0), len(less)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = choose.choices(range(count), k=count)
        ratios.append(pooled([more[at] for at in drawn], part) / pooled([less[at] for at in drawn], part))
    ratios.sort()
    return ratios[RESAMPLES // 40], ratios[-1 - RESAMPLES // 40]


def print_pooled(less: Sequence[Sequence[float]], more: Sequence[Sequence[float]]) -> None:
    """Print p50 and p99 of the times of all rounds, in seconds, and the interval of their ratio."""
    for part in (0.5, 0.99):
        before, after = pooled(less, part), pooled(more, part)
        least, most = ratio_interval(less, more, part)
        print(
            f"p{100 * part:.0f} of all rounds: {1000 * before:.3f} and {1000 * after:.3f} ms,"
            f" {after / before:.3f} times ({least:.3f} to {most:.3f})"
        )
