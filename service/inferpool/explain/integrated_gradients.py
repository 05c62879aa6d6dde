"""Integrated gradients: the gradients along the straight path from the baseline to the row, summed up.

The contribution of an element is the integral of its derivative along the path, times the length of the path
in the direction of the element. The contributions add up to the step of the output, as far as the sum comes
close to the integral; more points on the path bring it closer. The points and weights are those of Captum's
`IntegratedGradients`, so the values are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from inferpool.explain.estimators import Estimate, TooFewPasses
from inferpool.tensors import Array

INTEGRATED_GRADIENTS: Final = "integrated-gradients"
USUAL_STEPS: Final = 50
"""Points on the path at first, as in Captum."""
_LEAST_STEPS: Final = 2


class PathPoints(NamedTuple):
    """Points on the path of each baseline. Several of them are the rows of a run.

    Attributes:
        positions: FP64 `[points]`: 0 is the baseline, 1 the row.
        baselines: the number of the baseline of each point.
        weights: what the gradient at each point counts for. All weights add up to 1.
    """

    positions: Array
    baselines: Array
    weights: Array

    def pieces(self, size: int) -> Iterator[PathPoints]:
        """Yield the points in order, at most `size` at a time."""
        for start in range(0, len(self.positions), size):
            end = start + size
            yield PathPoints(self.positions[start:end], self.baselines[start:end], self.weights[start:end])


def path_points(steps: int, baselines: int) -> PathPoints:
    """Return the points of the Gauss-Legendre rule: `steps` for each of the baselines.

    `steps` is at most `USUAL_STEPS`, or a multiple of it: then the path has as many equal parts.
    """
    parts = max(1, steps // USUAL_STEPS)
    nodes, weights = _rule(steps // parts)
    positions = (np.arange(parts)[:, None] + (1 + nodes) / 2).reshape(-1) / parts
    return PathPoints(
        np.repeat(positions, baselines),
        np.tile(np.arange(baselines), steps),
        np.repeat(np.tile(weights, parts) / (2 * parts * baselines), baselines),
    )


@lru_cache(USUAL_STEPS)
def _rule(points: int) -> tuple[Array, Array]:
    """Return the points and weights of the rule for the integral from -1 to 1.

    Time and memory grow with the third and the second power of `points`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return nodes, weights


def integrate(
    step: float, tolerance: float, baselines: int, most: int, sum_up: Callable[[PathPoints], Array | None]
) -> tuple[Estimate, int]:
    """Return the contributions to `step`, and how many points each path had.

    The points are doubled until the contributions add up to `step` within `tolerance`, or more than `most`
    gradients would be computed for all baselines together. `sum_up` returns the contributions FP64
    `[features]` by the given points, or None if time is up. Raises TooFewPasses.
    """
    steps = min(USUAL_STEPS, most // baselines)
    if steps < _LEAST_STEPS:
        raise TooFewPasses(_LEAST_STEPS * baselines)
    left = most
    found: Array | None = None
    used = 0
    complete = True
    while found is None or (abs(float(found.sum()) - step) > tolerance and steps * baselines <= left):
        sums = sum_up(path_points(steps, baselines))
        if sums is None:
            complete = False
            break
        left -= steps * baselines
        found, used = sums, steps
        steps *= 2
    if found is None:
        raise TooFewPasses(min(USUAL_STEPS, most // baselines) * baselines)
    # How far the sum is from the integral is known for the sum of all contributions only.
    return Estimate(found, np.full(len(found), np.nan), exact=False, complete=complete), used
