"""Noise for counts: its distribution is the stated one, and so is the privacy that it gives."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from inferpool.privacy.noise import CountNoise

DRAWS = 20_000


@pytest.mark.parametrize(("epsilon", "sensitivity"), [(1.0, 1), (0.5, 1), (1.0, 3)])
def test_the_noise_is_a_discrete_laplace_distribution(epsilon: float, sensitivity: int) -> None:
    """Each probability is within five standard errors of that of the two-sided geometric distribution."""
    noise = CountNoise(epsilon, sensitivity, random.Random(7).randrange)
    found = Counter(noise.draw() for _ in range(DRAWS))
    ratio = math.exp(-epsilon / sensitivity)
    for number in range(-6, 7):
        expected = (1 - ratio) / (1 + ratio) * ratio ** abs(number)
        error = math.sqrt(expected * (1 - expected) / DRAWS)
        assert found[number] / DRAWS == pytest.approx(expected, abs=5 * error)


def test_neighbouring_counts_are_told_apart_by_no_more_than_epsilon() -> None:
    """By the exact probabilities: the largest ratio for counts that differ by 1 is e to the epsilon."""
    noise = CountNoise(0.7, 1, random.Random(3).randrange)
    found = Counter(noise.draw() for _ in range(DRAWS))
    for number in range(-3, 3):
        ratio = found[number] / found[number + 1]
        assert abs(math.log(ratio)) < 0.7 + 0.12


@pytest.mark.parametrize(("epsilon", "sensitivity"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (1.0, 0), (1e9, 1)])
def test_what_gives_no_privacy_is_refused(epsilon: float, sensitivity: int) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        CountNoise(epsilon, sensitivity)


def test_the_generator_is_the_secure_one() -> None:
    """Equal seeds of Python's own generator lead to other noise."""
    rows = []
    for _ in range(2):
        random.seed(1)
        noise = CountNoise(0.01)
        rows.append([noise.draw() for _ in range(20)])
    assert rows[0] != rows[1]
