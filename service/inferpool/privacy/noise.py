"""Noise for counts, by which nobody can tell whether one row is in them.

The noise is a discrete Laplace distribution (the two-sided geometric mechanism of Ghosh, Roughgarden and
Sundararajan, "Universally utility-maximizing privacy mechanisms", 2009), drawn exactly by Algorithm 2 of
Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", 2020. It uses integers of the
system's secure generator alone: floating-point noise has gaps that reveal the count (Mironov, "On
significance of the least significant bits for differential privacy", 2012).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from fractions import Fraction
from typing import Final

LEAST_EPSILON: Final = 0.001
MOST_EPSILON: Final = 100.0
_STEPS: Final = 1_000_000
"""An epsilon is rounded down to a multiple of a millionth, so that the noise is never less than stated."""

Below = Callable[[int], int]
"""Draws an integer from 0 up to, but without, its argument; each with the same probability."""


class CountNoise:
    """Draws noise for counts that one row changes by at most `sensitivity`: epsilon-differential privacy."""

    def __init__(self, epsilon: float, sensitivity: int = 1, below: Below = secrets.randbelow) -> None:
        """Raises ValueError for an `epsilon` outside of 0.001 to 100, or a `sensitivity` below 1."""
        if not LEAST_EPSILON <= epsilon <= MOST_EPSILON or sensitivity < 1:
            raise ValueError(
                f"epsilon is {epsilon:g} and sensitivity {sensitivity}; expected 0.001 to 100, and 1"
            )
        scale = Fraction(sensitivity * _STEPS, math.floor(epsilon * _STEPS))
        self._numerator, self._denominator = scale.numerator, scale.denominator
        self._below = below

    def draw(self) -> int:
        """An integer x with a probability in proportion to exp(-|x| * epsilon / sensitivity)."""
        below, numerator = self._below, self._numerator
        while True:
            rest = below(numerator)
            if not self._exp_minus(rest, numerator):
                continue
            whole = 0
            while self._exp_minus(1, 1):
                whole += 1
            size = (rest + numerator * whole) // self._denominator
            is_negative = below(2)
            if is_negative and not size:
                continue  # 0 has one sign only
            return -size if is_negative else size

    def _exp_minus(self, numerator: int, denominator: int) -> bool:
        """True with the probability exp(-numerator / denominator), for a fraction of at most 1."""
        count = 1
        while self._below(denominator * count) < numerator:
            count += 1
        return count % 2 == 1
