"""The cost of a row if rows have different sizes: pictures of any height and width, waveforms of any length.

Rows of a few sizes are timed at load. Between these sizes, and above them, the cost follows a power of the
number of elements. Everything that counts rows (batch limits, bounds of the queue, deadlines) then counts
rows of the size that batches were measured with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

LINEAR: Final = 1.0
"""The least growth above the largest measured size: every element is at least read."""

QUADRATIC: Final = 2.0
"""The largest: attention compares every element with every other."""


class CostPoint(NamedTuple):
    """One measured size.

    Attributes:
        elements: elements of a row, in all its inputs.
        seconds: how long such a row runs alone; 0 if nothing was measured.
        load: its cost, in rows of the size that batches were measured with.
    """

    elements: int
    seconds: float
    load: float


@dataclass(frozen=True, slots=True)
class RowCost:
    """The cost of a row by its number of elements.

    Attributes:
        points: at least one measured size; elements and costs rise.
        least: the least cost of a row, so that a limit on costs limits rows as well.
    """

    points: tuple[CostPoint, ...]
    least: float = 1.0

    def load(self, elements: int) -> float:
        """Return the cost of a row of so many elements, in rows of the size that batches were measured with.

        Below the smallest measured size the cost is that of the smallest.
        """
        low = self.points[0]
        if elements <= low.elements:
            return max(self.least, low.load)
        for high in self.points:
            if elements <= high.elements:
                return max(self.least, _grown(low, elements, _growth(low, high)))
            low = high
        return max(self.least, _grown(low, elements, self.growth))

    @property
    def growth(self) -> float:
        """The power of the elements that the cost follows above the largest measured size."""
        if len(self.points) < 2:
            return LINEAR
        return min(QUADRATIC, max(LINEAR, _growth(*self.points[-2:])))


def _grown(point: CostPoint, elements: int, growth: float) -> float:
    return float(point.load * (elements / point.elements) ** growth)


def _growth(low: CostPoint, high: CostPoint) -> float:
    return math.log(high.load / low.load) / math.log(high.elements / low.elements)
