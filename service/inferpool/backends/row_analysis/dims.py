"""Sizes of dimensions as products: `2 * rows * h`, where `h` is a size that does not depend on the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

ROWS: Final = "$rows"
"""The symbol for the number of rows of a batch."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A size: `coefficient` times all `symbols`.

    A symbol stands for a size that is known only when the model runs. Equal symbols are equal sizes. A sum
    has no such form and becomes a symbol of its own, written as a text that names its terms.
    """

    coefficient: int
    symbols: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether the size is a plain number."""
        return not self.symbols

    @property
    def row_factors(self) -> int:
        """How many symbols depend on the number of rows."""
        return sum(ROWS in symbol for symbol in self.symbols)

    def times(self, other: Dim) -> Dim:
        """Return the product of two sizes."""
        if not self.coefficient or not other.coefficient:
            return Dim(0)
        return Dim(self.coefficient * other.coefficient, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Dim) -> Dim | None:
        """Return the quotient if the division is exact whatever the symbols stand for; else None."""
        if not other.coefficient or self.coefficient % other.coefficient:
            return None
        if not self.coefficient:
            return Dim(0)
        mine = Counter(self.symbols)
        mine.subtract(other.symbols)
        if any(count < 0 for count in mine.values()):
            return None
        return Dim(self.coefficient // other.coefficient, tuple(sorted(mine.elements())))

    def text(self) -> str:
        """Return the size as a text; equal sizes have equal texts."""
        return "*".join((str(self.coefficient), *self.symbols))


ONE: Final = Dim(1)
A_ROW: Final = Dim(1, (ROWS,))


def opaque(operation: str, *operands: Dim) -> Dim:
    """Return the size that `operation` makes of `operands`, as a symbol: it depends on rows if they do."""
    return Dim(1, (f"{operation}({','.join(each.text() for each in operands)})",))


def product(dims: Iterable[Dim]) -> Dim:
    """Return the product of sizes; 1 for none."""
    result = ONE
    for dim in dims:
        result = result.times(dim)
    return result


def plus(left: Dim, right: Dim) -> Dim:
    """Return the sum of two sizes."""
    if left.is_known and right.is_known:
        return Dim(left.coefficient + right.coefficient)
    if left.symbols == right.symbols:
        total = left.coefficient + right.coefficient
        return Dim(total, left.symbols) if total else Dim(0)
    if not left.coefficient or not right.coefficient:
        return right if not left.coefficient else left
    first, second = sorted((left, right), key=Dim.text)
    return opaque("sum", first, second)


def minus(left: Dim, right: Dim) -> Dim:
    """Return the difference of two sizes."""
    return plus(left, right.times(Dim(-1)))


def broadcast(left: Dim, right: Dim) -> Dim | None:
    """Return the size that two sizes are broadcast to; None if they cannot be told to fit."""
    if left == right or right == ONE:
        return left
    if left == ONE:
        return right
    if left.is_known and right.is_known:
        return None
    if left.row_factors or right.row_factors:
        return None
    if left.is_known or right.is_known:
        return left if left.is_known else right
    return opaque("fit", *sorted((left, right), key=Dim.text))
