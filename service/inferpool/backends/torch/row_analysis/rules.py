"""The rule of each operation of ATen, and what holds for every call whatever its rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from inferpool.backends.row_analysis.rules import undecided
from inferpool.backends.row_analysis.values import Kind, Shape, Value, like, mixed, unknown
from inferpool.backends.torch.row_analysis import axes, elements, indexing, networks, shapes
from inferpool.backends.torch.row_analysis.call import Call, CallRule

RULES: Final[Mapping[str, CallRule]] = {
    **elements.RULES,
    **shapes.RULES,
    **axes.RULES,
    **networks.RULES,
    **indexing.RULES,
}
"""The rule of each operation, by its name without overload: with its namespace unless that is `aten`."""

VIEWS: Final = frozenset((
    "T", "_conj", "_reshape_alias", "adjoint", "alias", "alpha_dropout", "as_strided", "broadcast_to",
    "chunk", "conj", "contiguous", "detach", "diagonal", "dropout", "expand", "expand_as",
    "feature_alpha_dropout", "feature_dropout", "flatten", "imag", "lift", "lift_fresh", "mH", "mT",
    "moveaxis", "movedim", "narrow", "numpy_T", "permute", "positive", "real", "reshape", "reshape_as",
    "resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze",
    "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type_as", "unbind", "unflatten",
    "unfold", "unsqueeze", "view", "view_as", "view_as_complex", "view_as_real",
))  # fmt: skip
"""Operations whose result may lie in the memory of their first argument."""

_WITH_COUNTS: Final = frozenset((
    *shapes.RULES, *(name for name, rule in elements.RULES.items() if rule is elements.identity),
    "slice", "index", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only", "native_group_norm",
    "affine_grid_generator", "item", "_local_scalar_dense",
))  # fmt: skip
"""Operations whose rules know integers that depend on the number of rows."""


def outputs_of(call: Call) -> list[Value]:
    """Return the values of a call's outputs."""
    tensors = call.tensors()
    stopped = undecided(tensors)
    if stopped is not None:
        return call.every(stopped)
    rule = RULES.get(call.operation)
    if rule is None:
        return call.every(unknown(f"{call.label}: no rule for this operation"))
    if call.operation not in _WITH_COUNTS and any(each.kind is Kind.COUNTED for each in tensors):
        return call.every(mixed(f"{call.label} computes with the number of rows"))
    try:
        results = rule(call)
    except (ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
        return call.every(unknown(f"{call.label}: {type(error).__name__} {error}".rstrip()))
    return [_agreed(call, value, call.shape(index)) for index, value in enumerate(results)]


def _agreed(call: Call, value: Value, shape: Shape | None) -> Value:
    """Return a value with the shape that was recorded when the program was exported.

    If the recorded shape has the rows elsewhere than the rules say, nothing is claimed.
    """
    if shape is None or not value.is_decided:
        return value
    with_rows = [axis for axis, dim in enumerate(shape) if dim.row_factors]
    if value.kind is Kind.COUNTED:
        return value
    if value.kind is Kind.SHARED:
        if with_rows:
            return unknown(f"{call.label}: values without rows have a shape with rows")
        return Value(Kind.SHARED, shape, constant=value.constant, elements=value.elements)
    assert value.shape is not None
    if len(shape) != len(value.shape) or with_rows != [value.axis]:
        return unknown(f"{call.label}: the rows are not on the axis that was exported")
    if shape[value.axis] != value.shape[value.axis]:
        return unknown(f"{call.label}: there are not as many rows as were exported")
    return like(value, shape)
