"""The expected latency of a batch by its size: measured at load, and kept up to date while serving."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple

WEIGHT: Final = 0.1
"""Weight of a new measurement in the exponentially weighted mean of its bucket."""

OUTLIER: Final = 4.0
"""A measurement counts as at most this many times the mean of its bucket."""

FIRST_SPREAD: Final = 0.1
"""The relative spread that is assumed before any has been measured."""


class Measurement(NamedTuple):
    """One line of the table: batches of about `rows` rows take `seconds`. Both are means over `runs` runs."""

    rows: float
    seconds: float
    runs: int


class LatencyModel:
    """Latency by batch size, in buckets of …, ½, 1, 2, 4, … rows, each an exponentially weighted mean.

    A row that is smaller than those that were measured at load counts as less than one.

    A bucket holds the mean of both the rows and the seconds of its batches, so that a size between two
    buckets is interpolated along the measurements. One thread may write at a time; any thread may read.
    """

    def __init__(self, table: Iterable[Measurement] = ()) -> None:
        """`table` has earlier measurements, in any order."""
        self._buckets: dict[float, Measurement] = {_bucket(line.rows): line for line in table}
        self._spread = FIRST_SPREAD
        self._curve: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
        self._update_curve()

    def observe(self, rows: float, seconds: float) -> None:
        """Take in one batch of `rows` rows (more than 0) that ran for `seconds`."""
        bucket = _bucket(rows)
        known = self._buckets.get(bucket)
        if known is None:
            self._buckets[bucket] = Measurement(rows, seconds, 1)
        else:
            # The first few runs count equally, so that a cold first run is soon outweighed.
            weight = max(WEIGHT, 1 / (known.runs + 1))
            # One run that was held up says little about the next. A lasting change still gets through.
            seconds = min(seconds, OUTLIER * known.seconds)
            # Compared with the curve, because a bucket's mean is that of batches of different sizes.
            if (expected := self.seconds(rows)) > 0:
                self._spread += WEIGHT * (abs(seconds / expected - 1) - self._spread)
            self._buckets[bucket] = Measurement(
                known.rows + weight * (rows - known.rows),
                known.seconds + weight * (seconds - known.seconds),
                known.runs + 1,
            )
        self._update_curve()

    def seconds(self, rows: float) -> float:
        """Return the expected seconds of a batch of `rows` rows; 0 while nothing is known.

        The expectation is linear between measurements, proportional to rows above the largest, and constant
        below the smallest.
        """
        sizes, times = self._curve
        if not sizes:
            return 0.0
        if rows <= sizes[0]:
            return times[0]
        if rows >= sizes[-1]:
            return times[-1] * rows / sizes[-1]
        right = bisect_left(sizes, rows)
        share = (rows - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return times[right - 1] + share * (times[right] - times[right - 1])

    def safety_factor(self) -> float:
        """Return how many times the expected time a run should be given: the mean and four mean deviations.

        TCP computes its retransmission timeout likewise (Jacobson, "Congestion avoidance and control", 1988;
        RFC 6298).
        """
        return 1 + 4 * self._spread

    def runs(self, rows: float) -> int:
        """Return on how many runs the expectation for `rows` rows is based."""
        known = self._buckets.get(_bucket(rows))
        if known is not None:
            return known.runs
        return max((line.runs for line in self._buckets.values()), default=0)

    def table(self) -> list[Measurement]:
        """Return the measurements, smallest batch first."""
        return [self._buckets[bucket] for bucket in sorted(self._buckets)]

    def _update_curve(self) -> None:
        # Noise can make a larger batch look quicker than a smaller one. Deadlines are judged by this curve,
        # so it never falls: a smaller batch is not expected to take longer than a larger one.
        lines = self.table()
        times: list[float] = []
        ceiling = float("inf")
        for line in reversed(lines):
            ceiling = min(ceiling, line.seconds)
            times.append(ceiling)
        self._curve = (tuple(line.rows for line in lines), tuple(reversed(times)))


def _bucket(rows: float) -> float:
    """Return the next power of two at or above `rows`, which is rounded if it is more than 1."""
    if rows > 0.5:
        return float(1 << max(0, (round(rows) - 1).bit_length()))
    mantissa, exponent = math.frexp(rows)
    return math.ldexp(1.0, exponent - (mantissa == 0.5))
