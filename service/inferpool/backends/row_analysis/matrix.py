"""Rules of products of matrices."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.dims import ONE, Dim
from inferpool.backends.row_analysis.elementwise import combine
from inferpool.backends.row_analysis.step import Rule, Step
from inferpool.backends.row_analysis.values import Kind, Value, like, mixed, shared, unknown


def product_of(step: Step, left: Value, right: Value) -> Value:
    """Return the product of two stacks of matrices, as numpy.matmul has it."""
    if Kind.COUNTED in (left.kind, right.kind):
        return mixed(f"{step.label} computes with the number of rows")
    if left.kind is Kind.SHARED and right.kind is Kind.SHARED:
        return shared(step.inferred())
    if left.shape is None or right.shape is None:
        return unknown(f"{step.label}: the rank of an input is not known")
    if not left.shape or not right.shape:
        return unknown(f"{step.label}: an input is a single number")
    # A vector is a matrix of one row on the left, of one column on the right.
    vectors = (len(left.shape) == 1, len(right.shape) == 1)
    if vectors[0]:
        left = Value(left.kind, (ONE, *left.shape), left.axis + 1, left.outer, left.inner)
    if vectors[1]:
        assert right.shape is not None
        right = Value(right.kind, (*right.shape, ONE), right.axis, right.outer, right.inner)
    assert left.shape is not None
    assert right.shape is not None
    rank = max(len(left.shape), len(right.shape))
    sides = {
        "left": left.axis + rank - len(left.shape) if left.kind is Kind.ROWED else None,
        "right": right.axis + rank - len(right.shape) if right.kind is Kind.ROWED else None,
    }
    if sides["left"] == rank - 1 or sides["right"] == rank - 2:
        return mixed(f"{step.label} sums over the rows")
    stacked = [axis for axis in sides.values() if axis is not None]
    if len(stacked) == 2 and (stacked[0] != stacked[1] or not left.lies_as(right)):
        return mixed(f"{step.label} multiplies each row with each")
    axis = stacked[0]
    first = left if left.kind is Kind.ROWED else right
    shape: list[Dim] = []
    for index in range(rank - 2):
        mine, theirs = index - rank + len(left.shape), index - rank + len(right.shape)
        sizes = [left.shape[mine] if mine >= 0 else ONE, right.shape[theirs] if theirs >= 0 else ONE]
        if index == axis:
            for side, size in zip((left, right), sizes, strict=True):
                if side.kind is not Kind.ROWED and size != ONE:
                    return unknown(f"{step.label}: a value of a fixed size meets the rows")
            shape.append(ONE)
        else:
            known = [size for size in sizes if size != ONE]
            shape.append(known[0] if known else ONE)
    shape += [left.shape[-2], right.shape[-1]]
    result = like(first, tuple(shape), axis)
    for drop, at in zip(vectors, (rank - 2, rank - 1), strict=True):
        if drop and result.kind is Kind.ROWED:
            assert result.shape is not None
            if result.axis == at:
                return unknown(f"{step.label}: the rows are no rows of a matrix")
            at = min(at, len(result.shape) - 1)
            shape_left = (*result.shape[:at], *result.shape[at + 1 :])
            result = like(result, shape_left, result.axis - (result.axis > at))
    return result


def matmul(step: Step) -> list[Value]:
    """MatMul, and MatMulInteger, whose zero points must be those of all rows."""
    left, right = step.required(0), step.required(1)
    if any(other.kind is not Kind.SHARED for other in step.given()[2:]):
        return [unknown(f"{step.label}: a zero point depends on the rows")]
    return [product_of(step, left, right)]


def qlinear_matmul(step: Step) -> list[Value]:
    """QLinearMatMul: scales and zero points must be those of all rows."""
    left, right = step.inputs[0], step.inputs[3]
    assert left is not None
    assert right is not None
    others = [value for index, value in enumerate(step.inputs) if index not in (0, 3) and value is not None]
    if any(other.kind is not Kind.SHARED for other in others):
        return [unknown(f"{step.label}: a scale depends on the rows")]
    return [product_of(step, left, right)]


def gemm(step: Step) -> list[Value]:
    """Gemm: two matrices, either of them transposed, and a sum."""
    sides = []
    for value, transposed in zip(step.inputs[:2], ("transA", "transB"), strict=True):
        assert value is not None
        if value.shape is not None and step.integer(transposed, 0):
            if len(value.shape) != 2:
                return [unknown(f"{step.label}: an input is no matrix")]
            axis = 1 - value.axis if value.kind is Kind.ROWED else 0
            value = Value(value.kind, value.shape[::-1], axis, value.outer, value.inner)
        sides.append(value)
    result = product_of(step, *sides)
    added = step.input(2)
    return [combine(step, [result, added]) if added is not None and result.is_decided else result]


def weights_by_nbits(step: Step) -> list[Value]:
    """com.microsoft.MatMulNBits: the weights are packed, and shared."""
    value = step.required(0)
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]) or value.shape is None:
        return [unknown(f"{step.label}: the weights depend on the rows")]
    if value.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if value.axis == len(value.shape) - 1:
        return [mixed(f"{step.label} sums over the rows")]
    return [like(value, (*value.shape[:-1], Dim(step.integer("N", 0))))]


def einsum(step: Step) -> list[Value]:
    """Einsum: the rows must have one letter in all inputs that have rows, and it must be in the output."""
    values = step.given()
    if all(value.kind is Kind.SHARED for value in values):
        return [shared(step.inferred())]
    equation = step.attributes["equation"]
    text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    terms, arrow, result = text.partition("->")
    if not arrow or "." in text:
        return [unknown(f"{step.label}: the equation {text!r} names no output, or leaves axes out")]
    letters: set[str] = set()
    sizes: dict[str, Dim] = {}
    first: Value | None = None
    for term, value in zip(terms.split(","), values, strict=True):
        if value.shape is None or len(value.shape) != len(term) or len(set(term)) != len(term):
            return [unknown(f"{step.label}: an input has not the rank that {text!r} says")]
        if value.kind is Kind.COUNTED:
            return [mixed(f"{step.label} computes with the number of rows")]
        if value.kind is Kind.ROWED:
            if first is not None and not value.lies_as(first):
                return [unknown(f"{step.label} combines rows that are arranged differently")]
            first = first or value
            letters.add(term[value.axis])
        for letter, size in zip(term, value.shape, strict=True):
            if sizes.get(letter, ONE) == ONE:
                sizes[letter] = size
    assert first is not None
    if len(letters) > 1:
        return [mixed(f"{step.label} multiplies each row with each")]
    (letter,) = letters
    for term, value in zip(terms.split(","), values, strict=True):
        if letter in term and value.kind is not Kind.ROWED:
            return [unknown(f"{step.label}: a value of a fixed size meets the rows")]
    if letter not in result:
        return [mixed(f"{step.label} sums over the rows")]
    return [like(first, tuple(sizes[each] for each in result), result.index(letter))]


RULES: Final[dict[str, Rule]] = {
    "MatMul": matmul,
    "MatMulInteger": matmul,
    "QLinearMatMul": qlinear_matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "com.microsoft.MatMulNBits": weights_by_nbits,
}
