"""What a batch of so many rows costs, as measured: at load, and ever after while serving."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple

WEIGHT: Final = 0.1
"""Weight of a new measurement in the exponentially weighted mean of its rung."""

OUTLIER: Final = 4.0
"""A measurement counts as at most so many times the mean of its rung."""


FIRST_SPREAD: Final = 0.1
"""The relative spread that is assumed until it has been seen."""


class Measurement(NamedTuple):
    """One line of the table: batches of about `rows` rows take `seconds` (means over `runs` runs)."""

    rows: float
    seconds: float
    runs: int


class Profile:
    """Latency by batch size, on rungs of 1, 2, 4, … rows, kept live by an exponentially weighted mean.

    A rung holds the mean of both rows and seconds of the batches that fell on it, so that reading
    between rungs interpolates along what was measured. One writer at a time; any thread may read.
    """

    def __init__(self, table: Iterable[Measurement] = ()) -> None:
        """`table` is what was measured before, in any order."""
        self._rungs: dict[int, Measurement] = {_rung(line.rows): line for line in table}
        self._spread = FIRST_SPREAD
        self._curve: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
        self._trace()

    def observe(self, rows: float, seconds: float) -> None:
        """Take in one batch of `rows` rows (at least 1) that ran for `seconds`."""
        rung = _rung(rows)
        known = self._rungs.get(rung)
        if known is None:
            self._rungs[rung] = Measurement(rows, seconds, 1)
        else:
            # The first few runs count equally, so that a cold first one does not linger.
            weight = max(WEIGHT, 1 / (known.runs + 1))
            # One run that was held up says little of the next; a lasting change gets through all the same.
            seconds = min(seconds, OUTLIER * known.seconds)
            # Against the curve, not the rung's mean: that a rung holds batches of many sizes is no spread.
            if (expected := self.seconds(rows)) > 0:
                self._spread += WEIGHT * (abs(seconds / expected - 1) - self._spread)
            self._rungs[rung] = Measurement(
                known.rows + weight * (rows - known.rows),
                known.seconds + weight * (seconds - known.seconds),
                known.runs + 1,
            )
        self._trace()

    def seconds(self, rows: float) -> float:
        """Expected seconds of a batch of `rows` rows; 0 while nothing is known.

        Linear between measurements, proportional to rows beyond the largest, never below the smallest.
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

    def caution(self) -> float:
        """How many times their expected time runs should be given: the mean and four mean deviations.

        As TCP waits for an answer (Jacobson, "Congestion avoidance and control", 1988; RFC 6298).
        """
        return 1 + 4 * self._spread

    def runs(self, rows: float) -> int:
        """How many runs the expectation for `rows` rows rests on."""
        known = self._rungs.get(_rung(rows))
        if known is not None:
            return known.runs
        return max((line.runs for line in self._rungs.values()), default=0)

    def table(self) -> list[Measurement]:
        """The measurements, smallest batch first."""
        return [self._rungs[rung] for rung in sorted(self._rungs)]

    def _trace(self) -> None:
        # Noise can make a larger batch look quicker than a smaller one. Deadlines are judged by this
        # curve, so it never falls: a smaller batch is not expected to take longer than a larger one.
        lines = self.table()
        times: list[float] = []
        ceiling = float("inf")
        for line in reversed(lines):
            ceiling = min(ceiling, line.seconds)
            times.append(ceiling)
        self._curve = (tuple(line.rows for line in lines), tuple(reversed(times)))


def _rung(rows: float) -> int:
    """The power of two that is next at or above `rows`."""
    return 1 << max(0, (round(rows) - 1).bit_length())
