"""Sizes as the exporter writes them: sums and products of symbols, in the notation of SymPy's `srepr`."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Set
from functools import reduce
from math import gcd

from inferpool.backends.row_analysis.dims import A_ROW, ONE, Dim, opaque, plus, product


def size_of(text: str, rows: Set[str]) -> Dim:
    """Return a size; the symbols in `rows` stand for the number of rows.

    Raises ValueError for a text that is no such size.
    """
    try:
        return _size(ast.parse(text, mode="eval").body, rows)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"{text!r} is no size") from error


def symbol_of(text: str) -> str | None:
    """Return the name of the symbol that a text consists of, None if it is anything else."""
    dim = size_of(text, frozenset())
    return dim.symbols[0] if dim.coefficient == 1 and len(dim.symbols) == 1 else None


def _size(node: ast.expr, rows: Set[str]) -> Dim:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"{ast.unparse(node)} is no size")
    kind = node.func.id
    if kind == "Symbol":
        name = str(ast.literal_eval(node.args[0]))
        return A_ROW if name in rows else Dim(1, (name,))
    if kind == "Integer":
        return Dim(int(ast.literal_eval(node.args[0])))
    if kind in ("Rational", "Float"):
        return Dim(1, (ast.unparse(node),))
    operands = [_size(each, rows) for each in node.args]
    if kind == "Mul":
        return product(operands)
    if kind == "Add":
        return _sum(operands)
    if kind == "Pow" and operands[1].is_known and operands[1].coefficient >= 0:
        return product([operands[0]] * operands[1].coefficient)
    return opaque(kind, *operands)


def _sum(terms: list[Dim]) -> Dim:
    """Return a sum with the factors that all terms share in front, so that equal sums have equal texts."""
    common = reduce(lambda left, right: left & right, (Counter(term.symbols) for term in terms))
    number = reduce(gcd, (term.coefficient for term in terms))
    factor = Dim(number, tuple(sorted(common.elements()))) if number else ONE
    rests = [term.over(factor) for term in terms]
    return reduce(plus, sorted((rest for rest in rests if rest is not None), key=Dim.text)).times(factor)
