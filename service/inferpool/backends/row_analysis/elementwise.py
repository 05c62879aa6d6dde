"""Rules of operations on one element, or on elements in the same position, with broadcasting."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.dims import ONE, Dim, broadcast, minus, opaque, plus
from inferpool.backends.row_analysis.step import Rule, Step
from inferpool.backends.row_analysis.values import (
    Kind,
    Shape,
    Value,
    integers,
    like,
    mixed,
    shared,
    unknown,
)

_INTEGERS: Final = (5, 6, 7)
"""The datatypes INT16, INT32 and INT64, as ONNX numbers them."""


def combine(step: Step, values: list[Value]) -> Value:
    """Return what elements in the same position of `values`, broadcast, are combined to."""
    with_rows = [value for value in values if value.kind is Kind.ROWED]
    if any(value.kind is Kind.COUNTED for value in values):
        # Without rows, such values may still be asked for their shape.
        says = f"{step.label} computes with the number of rows"
        return mixed(says) if with_rows else Value(Kind.COUNTED, _broadcast(values), reason=says)
    if not with_rows:
        return shared(step.settled(_broadcast(values)))
    if any(value.shape is None for value in values):
        return unknown(f"{step.label}: the rank of an input is not known")
    first = with_rows[0]
    right = first.from_right()
    for value in with_rows:
        if value.from_right() != right:
            return mixed(f"{step.label} combines rows that lie on different axes, each with each")
        if not value.lies_as(first):
            return unknown(f"{step.label} combines rows that are arranged differently")
    rank = max(len(value.shape or ()) for value in values)
    shape: list[Dim] = []
    for axis in range(rank):
        found: Dim | None = ONE
        for value in values:
            assert value.shape is not None
            index = axis - rank + len(value.shape)
            if index < 0:
                continue
            if axis - rank == right:
                if value.kind is not Kind.ROWED and value.shape[index] != ONE:
                    return unknown(f"{step.label}: a value of a fixed size meets the rows")
                continue
            found = broadcast(found, value.shape[index]) if found is not None else None
        shape.append(found if found is not None else step.fresh(axis))
    return like(first, tuple(shape), rank + right)


def _broadcast(values: list[Value]) -> Shape | None:
    """Return the shape that values are broadcast to, None if it is not known."""
    if any(value.shape is None for value in values):
        return None
    rank = max(len(value.shape or ()) for value in values)
    shape: list[Dim] = []
    for axis in range(-rank, 0):
        sizes = {value.shape[axis] for value in values if value.shape and len(value.shape) >= -axis} - {ONE}
        if len(sizes) > 1:
            return None
        shape.append(sizes.pop() if sizes else ONE)
    return tuple(shape)


def elementwise(step: Step) -> list[Value]:
    """Every input is an operand; every output has an element for each position."""
    result = combine(step, step.given())
    return [result] * len(step.outputs)


def first_input(step: Step) -> list[Value]:
    """The first input's elements are computed one by one; what the other inputs say holds for all of them."""
    value = step.required(0)
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [unknown(f"{step.label}: a parameter depends on the rows")] * len(step.outputs)
    return [combine(step, [value])] * len(step.outputs)


def identity(step: Step) -> list[Value]:
    """The value as it is."""
    value = step.required(0)
    return [value]


def cast(step: Step) -> list[Value]:
    """Cast: sizes stay sizes."""
    value = step.required(0)
    if value.numbering is not None and step.integer("to", 0) in _INTEGERS:
        return [value]
    if value.elements is not None:
        return [Value(value.kind, value.shape, elements=value.elements)]
    return elementwise(step)


def dropout(step: Step) -> list[Value]:
    """Dropout does nothing unless it trains."""
    value, training = step.inputs[0], step.input(2)
    assert value is not None
    if step.opset < 7 and not step.integer("is_test", 0):
        return [unknown(f"{step.label} drops elements at random")] * len(step.outputs)
    if training is not None and (training.constant is None or bool(training.constant.any())):
        return [unknown(f"{step.label} drops elements at random")] * len(step.outputs)
    return [value, *[combine(step, [value])] * (len(step.outputs) - 1)]


def arithmetic(step: Step) -> list[Value]:
    """Add, Sub, Mul, Div, Equal and Where: of sizes, as in shapes, and of all else element by element."""
    values = step.given()
    if any(value.kind is Kind.ROWED for value in values):
        return elementwise(step)
    if all(value.elements is not None for value in values):
        found = _of_sizes(step, values)
        if found is not None:
            return [found]
    return elementwise(step)


def _of_sizes(step: Step, values: list[Value]) -> Value | None:
    length = max(len(value.elements or ()) for value in values)
    columns: list[tuple[Dim, ...]] = []
    for value in values:
        elements = value.elements or ()
        if len(elements) not in (1, length):
            return None
        columns.append(elements * length if len(elements) == 1 else elements)
    result: list[Dim] = []
    for row in zip(*columns, strict=True):
        each = _of_size(step.operation, row)
        if each is None:
            return None
        result.append(each)
    rank = max(value.rank or 0 for value in values)
    return integers(tuple(result), (Dim(length),) if rank else ())


def _of_size(operation: str, operands: tuple[Dim, ...]) -> Dim | None:
    if operation == "Where":
        condition, chosen, other = operands
        return (chosen if condition.coefficient else other) if condition.is_known else None
    left, right = operands
    if operation == "Add":
        return plus(left, right)
    if operation == "Sub":
        return minus(left, right)
    if operation == "Mul":
        return left.times(right)
    if operation == "Div":
        if left.is_known and right.is_known and right.coefficient:
            # Integers are divided towards zero.
            quotient = abs(left.coefficient) // abs(right.coefficient)
            return Dim(quotient if (left.coefficient < 0) == (right.coefficient < 0) else -quotient)
        exact = left.over(right)
        return exact if exact is not None else opaque("quotient", left, right)
    if operation == "Equal":
        if left == right:
            return ONE
        if left.is_known and right.is_known:
            return Dim(0)
        # Sizes of at least one: they differ from 0 and from what is negative.
        known = left if left.is_known else right
        plain = right if left.is_known else left
        simple = not plain.is_known and all(not symbol.endswith(")") for symbol in plain.symbols)
        if known.is_known and known.coefficient < 0 and simple and plain.coefficient > 0:
            return Dim(0)
    return None


ELEMENTWISE: Final = (
    "Abs", "Acos", "Acosh", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd",
    "BitwiseNot", "BitwiseOr", "BitwiseXor", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Elu",
    "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "IsInf",
    "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Neg",
    "Not", "Or", "PRelu", "Pow", "Reciprocal", "RegexFullMatch", "Relu", "Round", "Selu", "Shrink",
    "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "StringConcat", "Sum", "Swish",
    "Tan", "Tanh", "ThresholdedRelu", "Xor", "ai.onnx.ml.Binarizer", "ai.onnx.ml.CategoryMapper",
    "ai.onnx.ml.LabelEncoder", "com.microsoft.BiasGelu", "com.microsoft.FastGelu", "com.microsoft.Gelu",
    "com.microsoft.QuickGelu",
)  # fmt: skip

RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Equal", "Where"), arithmetic),
    "Identity": identity,
    "Cast": cast,
    "Dropout": dropout,
}
