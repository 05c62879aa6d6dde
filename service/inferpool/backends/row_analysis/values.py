"""The knowledge about one value of a graph: its row axis, or the reason why the axis is unknown."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from inferpool.backends.row_analysis.dims import A_ROW, ONE, ROWS, Dim

Shape: TypeAlias = tuple[Dim, ...]


class Kind(Enum):
    """How a value depends on the rows of a batch."""

    SHARED = "shared"
    """The value depends on no row, nor on the number of rows."""
    COUNTED = "counted"
    """Integers that depend on the number of rows, as `Value.elements` says."""
    ROWED = "rowed"
    """Each row has its slice along one axis, and the slice depends on that row alone."""
    MIXED = "mixed"
    """A row's part of the value may depend on other rows."""
    UNKNOWN = "unknown"
    """The analysis cannot say; for want of a rule, or of a size."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph.

    Attributes:
        kind: how it depends on the rows.
        shape: its sizes, None if not even their number is known. Sizes that are not on the row axis do not
            depend on the rows.
        axis: the axis with the rows, of a ROWED value.
        outer: how many blocks the row axis has outside the rows.
        inner: how many elements the row axis has for each row of a block: the index of an element is
            (block * rows + row) * inner + element.
        constant: its content, if it is known.
        elements: its integers as sizes, for values of at most one dimension that shapes are made of.
        numbering: of a COUNTED value that numbers the rows: each element is its row's position times this.
        picks_own: whether a COUNTED value is a list of positions that each start with the number of the row.
        reason: why the value is MIXED or UNKNOWN.
        filler: the string that fills up the rows, if a MIXED value is a table of strings that is as wide as
            the longest row, and this is all that rows share.
    """

    kind: Kind
    shape: Shape | None = None
    axis: int = 0
    outer: Dim = ONE
    inner: Dim = ONE
    constant: np.ndarray[Any, Any] | None = None
    elements: tuple[Dim, ...] | None = None
    numbering: Dim | None = None
    picks_own: bool = False
    reason: str = ""
    filler: bytes | None = None

    @property
    def rank(self) -> int | None:
        """The number of dimensions, None if unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def is_decided(self) -> bool:
        """Whether operations can go on with the value."""
        return self.kind in (Kind.SHARED, Kind.ROWED, Kind.COUNTED)

    def lies_as(self, other: Value) -> bool:
        """Whether two ROWED values have the same arrangement of rows on their axes."""
        return self.outer == other.outer and self.inner == other.inner

    def numbered_axis(self) -> int:
        """The axis with the rows, of a value that numbers them; raises ValueError if there is none."""
        with_rows = [axis for axis, dim in enumerate(self.shape or ()) if dim == A_ROW]
        if len(with_rows) != 1:
            raise ValueError("the rows are not on one axis")
        return with_rows[0]

    def from_right(self) -> int:
        """The row axis counted from the right: -1 is the last."""
        assert self.shape is not None
        return self.axis - len(self.shape)


def shared(shape: Shape | None = None) -> Value:
    """Return a value that no row has a part in."""
    return Value(Kind.SHARED, shape)


def constant(array: np.ndarray[Any, Any]) -> Value:
    """Return a value whose content is known."""
    elements = None
    if array.ndim <= 1 and array.size <= 64 and array.dtype.kind in "iub":
        elements = tuple(Dim(int(each)) for each in array.reshape(-1))
    return Value(Kind.SHARED, tuple(map(Dim, array.shape)), constant=array, elements=elements)


def integers(elements: tuple[Dim, ...], shape: Shape) -> Value:
    """Return integers that are sizes: SHARED if none of them depends on the number of rows, else COUNTED."""
    if all(each.is_known for each in elements):
        array = np.array([each.coefficient for each in elements], np.int64)
        return constant(array.reshape([dim.coefficient for dim in shape]))
    counted = any(each.row_factors for each in elements)
    return Value(Kind.COUNTED if counted else Kind.SHARED, shape, elements=elements)


def rowed(shape: Shape, axis: int, outer: Dim = ONE, inner: Dim = ONE) -> Value:
    """Return a value with rows on `axis`; `shape[axis]` is set to what the arrangement of rows makes it."""
    length = outer.times(A_ROW).times(inner)
    shape = (*shape[:axis], length, *shape[axis + 1 :])
    value = Value(Kind.ROWED, shape, axis, outer, inner)
    if any(dim.row_factors for index, dim in enumerate(shape) if index != axis):
        return unknown("a size depends on the number of rows")
    if ROWS in "".join((*outer.symbols, *inner.symbols)):
        return unknown("the rows lie on their axis more than once")
    return value


def like(value: Value, shape: Shape | None = None, axis: int | None = None) -> Value:
    """Return a value with the rows arranged as in `value`, with another shape or axis."""
    if value.kind is not Kind.ROWED:
        return Value(value.kind, shape if shape is not None else value.shape, reason=value.reason)
    new_shape = value.shape if shape is None else shape
    assert new_shape is not None
    return rowed(new_shape, value.axis if axis is None else axis, value.outer, value.inner)


def mixed(reason: str) -> Value:
    """Return a value in which rows depend on one another."""
    return Value(Kind.MIXED, reason=reason)


def unknown(reason: str) -> Value:
    """Return a value of which nothing is known."""
    return Value(Kind.UNKNOWN, reason=reason)


def without_content(value: Value) -> Value:
    """Return the value without what is known of its content."""
    return replace(value, constant=None, elements=None)


def joined(first: Value, second: Value, name: str) -> Value:
    """Return what is true of a value that is either of two; unknown sizes are called after `name`."""
    if first == second and first.constant is None:
        return first
    for value in (first, second):
        if not value.is_decided:
            return value
    if first.kind is not second.kind:
        return unknown(f"{name} has rows in one case only")
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return Value(first.kind) if first.kind is Kind.SHARED else unknown(f"{name} changes its rank")
    shape = tuple(
        left if left == right else Dim(1, (f"{name}.{axis}",))
        for axis, (left, right) in enumerate(zip(first.shape, second.shape, strict=True))
    )
    if first.kind is Kind.ROWED:
        if first.axis != second.axis or not first.lies_as(second):
            return unknown(f"{name} has its rows on different axes")
        return like(first, shape)
    if first.kind is Kind.COUNTED:
        same = first.elements is not None and first.elements == second.elements
        return first if same else mixed(f"{name} depends on the number of rows")
    return shared(shape)
