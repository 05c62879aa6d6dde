"""Makes a profile: a KLL sketch of each field of numbers, the counts of its values of each category.

The sketches are those of Apache DataSketches. They take a few kilobytes however many rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from inferpool.drift.counts import number_text
from inferpool.drift.profile_file import BINS, MOST_FIELDS, MOST_VALUES, FieldProfile, Profile
from inferpool.errors import LoadError
from inferpool.system.install_hints import install_command
from inferpool.tensors import Array

_K: Final = 400
"""The accuracy of a KLL sketch: quantiles are off by less than 0.7 % of the rows."""
_MOST_COUNTED: Final = 10_000
"""Values of a category that are counted while the data is read; later new ones are counted together."""
_LEAST_ROWS: Final = 2
_ROWS_A_VALUE: Final = 10
"""Numbers are categories if each of their different values has at least so many rows in the mean."""
LEAST_ADVISED: Final = 500
"""Rows below which the shares of a profile are rough."""


class ProfileBuilder:
    """Takes the values of rows, and makes the profile of them."""

    def __init__(self) -> None:
        """Raises LoadError if the library of the sketches is not installed."""
        try:
            import datasketches
        except ImportError:
            raise LoadError(f"a profile needs datasketches: {install_command('drift')}") from None
        self._sketches = datasketches
        self._fields: dict[str, _Field] = {}
        self.rows = 0

    def add(self, values: Mapping[str, Array], rows: int) -> None:
        """Take the values of some rows, as `field_values` gives them."""
        self.rows += rows
        for name, found in values.items():
            field = self._fields.get(name)
            if field is None:
                field = self._fields[name] = _Field(self._sketches.kll_doubles_sketch(_K))
            field.add(found)

    def close(self) -> None:
        """Free the sketches: at the end of Python the library complains of each one that is left."""
        self._fields.clear()

    def profile(self, data: str) -> tuple[Profile, list[str]]:
        """The profile, and the names of fields that it has no room for: the last inputs. `data` says what the
        rows were.
        """
        # Outputs first: they tell more of a model than any one of its inputs.
        names = sorted(self._fields, key=lambda name: not name.startswith("outputs."))
        fields = [self._fields[name].profile(name) for name in names[:MOST_FIELDS]]
        return Profile(rows=self.rows, data=data[:200], fields=tuple(fields)), names[MOST_FIELDS:]


class _Field:
    """What is known of one field."""

    def __init__(self, sketch: Any) -> None:
        self._sketch = sketch
        self._missing = 0
        self._counts: dict[str, int] | None = {}
        self._others = 0
        self._is_text = False

    def add(self, values: Array) -> None:
        if values.dtype.kind == "O":
            self._is_text = True
            self._count(values.tolist())
            return
        finite = values[~np.isnan(values)]
        self._missing += len(values) - len(finite)
        self._sketch.update(finite)
        if self._counts is not None:
            # Few different integers are categories: quantiles would share bins. Other numbers are not,
            # because the same row may give others in another batch, or on another machine.
            self._count(map(number_text, finite.tolist()))
            if len(self._counts) > MOST_VALUES or bool((finite != np.floor(finite)).any()):
                self._counts = None

    def _count(self, texts: Any) -> None:
        counts = self._counts
        assert counts is not None
        for text in texts:
            if text in counts or len(counts) < _MOST_COUNTED:
                counts[text] = counts.get(text, 0) + 1
            else:
                self._others += 1

    def profile(self, name: str) -> FieldProfile:
        present = self._sketch.n
        counts = self._counts
        if counts is not None and (self._is_text or 0 < len(counts) <= present / _ROWS_A_VALUE):
            return self._categories(name, counts)
        total = present + self._missing
        if not present:
            return FieldProfile(name=name, kind="number", shares=(0.0, 1.0))
        ranks = [step / BINS for step in range(1, BINS)]
        edges = sorted({float(edge) for edge in self._sketch.get_quantiles(ranks)})
        below = [float(self._sketch.get_rank(edge, True)) for edge in edges]
        shares = [high - low for low, high in zip([0.0, *below], [*below, 1.0], strict=True)]
        weight = present / total
        cells = (*(share * weight for share in shares), 1 - weight)
        return FieldProfile(name=name, kind="number", edges=tuple(edges), shares=cells)

    def _categories(self, name: str, counts: Mapping[str, int]) -> FieldProfile:
        total = sum(counts.values()) + self._others + self._missing
        # A value of a single row could name a person, so it is among the others.
        common = [text for text in counts if counts[text] >= max(_LEAST_ROWS, total / 100)]
        common = sorted(common, key=lambda text: (-counts[text], text))[:MOST_VALUES]
        shares = [counts[text] / total for text in common]
        cells = (*shares, max(0.0, 1 - sum(shares)))
        return FieldProfile(name=name, kind="category", values=tuple(common), shares=cells)
