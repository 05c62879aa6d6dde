"""All rules, and what holds for every operation whatever its rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from inferpool.backends.row_analysis import arrange, elementwise, fixed_axes, index, matrix, mixing, reduce
from inferpool.backends.row_analysis.dims import ONE
from inferpool.backends.row_analysis.step import Rule, Step
from inferpool.backends.row_analysis.values import Kind, Value, mixed, unknown
from inferpool.backends.row_verdict import Independence, RowVerdict

RULES: Final[Mapping[str, Rule]] = {
    **elementwise.RULES,
    **arrange.RULES,
    **reduce.RULES,
    **matrix.RULES,
    **fixed_axes.RULES,
    **index.RULES,
    **mixing.RULES,
}
"""The rule of each operation, by its name in ONNX: with its domain unless that is ONNX's own."""

WITH_SIZES: Final = frozenset((
    "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "GatherND", "Identity",
    "If", "Loop", "Mul", "Pad", "Range", "ReduceProd", "Reshape", "Resize", "Scan", "Shape", "Size", "Slice",
    "Squeeze", "Sub", "Tile", "Unsqueeze", "Upsample", "Where",
))  # fmt: skip
"""Operations whose rules know integers that depend on the number of rows."""


def undecided(values: Iterable[Value]) -> Value | None:
    """Return a value that operations cannot go on with, rather a MIXED than an UNKNOWN one; else None."""
    found: Value | None = None
    for value in values:
        if value.kind is Kind.MIXED:
            return value
        if value.kind is Kind.UNKNOWN:
            found = found or value
    return found


def apply(rule: Rule, step: Step) -> list[Value]:
    """Return the values of the outputs of a node whose inputs are all decided."""
    count = len(step.outputs)
    knows = step.operation in WITH_SIZES or rule is elementwise.elementwise
    if not knows and any(each.kind is Kind.COUNTED for each in step.given()):
        return [mixed(f"{step.label} computes with the number of rows")] * count
    try:
        return rule(step)
    except (ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
        # A graph that is not as its operations are defined: a runtime may refuse it, or not.
        return [unknown(f"{step.label}: {type(error).__name__} {error}")] * count


def verdict_of(outputs: Sequence[tuple[str, Value]]) -> RowVerdict:
    """Return the verdict on a graph with these outputs, by name."""
    for name, value in outputs:
        if value.kind in (Kind.MIXED, Kind.COUNTED):
            return RowVerdict(Independence.MIXES, value.reason or f'output "{name}" counts the rows')
    for name, value in outputs:
        if value.kind is Kind.UNKNOWN:
            return RowVerdict(Independence.UNKNOWN, value.reason)
        if value.kind is Kind.SHARED:
            return RowVerdict(Independence.MIXES, f'output "{name}" is the same for all rows')
        if value.axis or value.outer != ONE or value.inner != ONE:
            # Runs show this, and name the shape.
            return RowVerdict(Independence.UNKNOWN, f'output "{name}" has not one entry for each row')
    return RowVerdict(Independence.INDEPENDENT, "no operation of the graph mixes rows")
