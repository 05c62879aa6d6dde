"""Counts the served values of a version in the bins of its profile, window by window. Holds no row.

The bins are those of the profile's quantile sketch. So a window is a few counts: they can be added up over
processes, one row changes one of them by one, and noise of a stated epsilon hides that row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np

from inferpool.drift.profile_file import MOST_VALUES, FieldProfile, Profile
from inferpool.privacy.noise import CountNoise
from inferpool.tensors import Array

MOST_CELLS: Final = MOST_VALUES + 1
"""Counts of a field at most: its values or bins, and one for all others."""
WINDOW: Final = 2 + MOST_CELLS
"""Numbers that tell a window: its own number, the tag of the profile's field, and the noisy counts."""


class ClosedWindow(NamedTuple):
    """A window that has ended: its number, and noisy counts by the name of the field."""

    number: int
    counts: Mapping[str, list[int]]


class WindowCounts:
    """The counts of the window that runs. For one thread."""

    def __init__(self, profile: Profile, window_s: float, noise: CountNoise) -> None:
        """Count in windows of `window_s` seconds since 1970, so that all processes have the same ones."""
        self._fields = {field.name: _Counter(field) for field in profile.fields}
        self._window_s = window_s
        self._noise = noise
        self._number = -1
        self._rows = 0

    def add(self, now: float, values: Mapping[str, Array]) -> ClosedWindow | None:
        """Count values by field at the moment `now`; returns the window before, if it has just ended."""
        closed = self.close_at(now)
        self._number = math.floor(now / self._window_s)
        for name, found in values.items():
            counter = self._fields.get(name)
            if counter is not None:
                counter.add(found)
                self._rows = 1
        return closed

    def close_at(self, now: float) -> ClosedWindow | None:
        """The window that has ended by `now`, with noise; None if it runs on, or has no rows."""
        number = math.floor(now / self._window_s)
        if not self._rows or number == self._number:
            return None
        noise = self._noise
        closed = ClosedWindow(
            self._number,
            {name: [count + noise.draw() for count in each.take()] for name, each in self._fields.items()},
        )
        self._rows = 0
        return closed


class _Counter:
    """The counts of one field."""

    def __init__(self, field: FieldProfile) -> None:
        self._edges = np.array(field.edges, np.float64)
        self._values = None if field.kind == "number" else {text: at for at, text in enumerate(field.values)}
        self._counts = np.zeros(len(field.shares), np.int64)

    def add(self, values: Array) -> None:
        cells = len(self._counts)
        if self._values is None:
            if values.dtype.kind == "O":
                return  # the field was of numbers when the profile was made
            at = np.searchsorted(self._edges, values, side="left")
            at[np.isnan(values)] = cells - 1
        else:
            known = self._values
            texts = values.tolist() if values.dtype.kind == "O" else map(number_text, values.tolist())
            at = np.fromiter((known.get(text, cells - 1) for text in texts), np.int64, len(values))
        self._counts += np.bincount(at, minlength=cells)

    def take(self) -> list[int]:
        counts: list[int] = self._counts.tolist()
        self._counts[:] = 0
        return counts


def number_text(number: float) -> str:
    """How a number is written as a category: `3` for 3.0."""
    return str(int(number)) if number.is_integer() else repr(number)
