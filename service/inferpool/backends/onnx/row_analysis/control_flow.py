"""Rules of If, Loop and Scan."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.dims import Dim
from inferpool.backends.row_analysis.step import Rule, Step, normal_axis
from inferpool.backends.row_analysis.values import (
    Kind,
    Value,
    joined,
    like,
    mixed,
    rowed,
    shared,
    unknown,
    without_content,
)

_MOST_ROUNDS: Final = 8
"""Rounds after which values that a loop carries must have settled."""


def choice(step: Step) -> list[Value]:
    """If: by a condition that all rows share."""
    (condition,) = step.given()
    count = len(step.outputs)
    if condition.kind is not Kind.SHARED:
        whose = "the number of rows" if condition.kind is Kind.COUNTED else "the rows"
        return [mixed(f"{step.label}: one condition for all rows, which depends on {whose}")] * count
    if condition.constant is not None and condition.constant.size == 1:
        taken = "then_branch" if bool(condition.constant.reshape(-1)[0]) else "else_branch"
        return step.analyse(step.attributes[taken], {})
    both = [step.analyse(step.attributes[branch], {}) for branch in ("then_branch", "else_branch")]
    return [
        joined(first, second, step.outputs[index])
        for index, (first, second) in enumerate(zip(both[0], both[1], strict=True))
    ]


def _forgetful(value: Value, name: str) -> Value:
    """Return the value as a loop carries it: a size that is no plain number may differ from turn to turn."""
    if value.shape is None or not value.is_decided:
        return without_content(value)
    if value.kind is Kind.COUNTED:
        return value
    shape = tuple(
        dim if dim.is_known else Dim(1, (f"{name}.{axis}",)) for axis, dim in enumerate(value.shape)
    )
    if value.kind is Kind.ROWED:
        return like(value, shape)
    return Value(Kind.SHARED, shape)


def _after(step: Step, before: list[Value], turned: list[Value]) -> list[Value]:
    """Return what a loop carries, whether it turns once more or not."""
    return [
        joined(value, _forgetful(turned[index], step.outputs[index]), step.outputs[index])
        for index, value in enumerate(before)
    ]


def loop(step: Step) -> list[Value]:
    """Loop: as often as all rows share."""
    count, condition, *carried = step.inputs
    total = len(step.outputs)
    body = step.attributes["body"]
    for value in (count, condition):
        if value is not None and value.kind is not Kind.SHARED:
            return [mixed(f"{step.label}: how often it turns depends on the rows")] * total
    names = [each.name for each in body.input]
    state = [
        _forgetful(value, step.outputs[index]) if value is not None else unknown("left out")
        for index, value in enumerate(carried)
    ]
    outputs: list[Value] = []
    for _ in range(_MOST_ROUNDS):
        given = dict(zip(names, [shared(()), shared(()), *state], strict=True))
        outputs = step.analyse(body, given)
        if outputs[0].kind is not Kind.SHARED:
            reason = outputs[0].reason or f"{step.label}: when it ends depends on the rows"
            return [mixed(reason) if outputs[0].is_decided else outputs[0]] * total
        after = _after(step, state, outputs[1:])
        if after == state:
            break
        state = after
    else:
        return [unknown(f"{step.label}: what it carries does not settle")] * total
    collected = [
        _stacked(value, 0, step, index) for index, value in enumerate(outputs[1 + len(state) :], len(state))
    ]
    return [*state, *collected]


def _stacked(value: Value, axis: int, step: Step, index: int) -> Value:
    """Return the value with a new axis for the turns of a loop."""
    if not value.is_decided or value.kind is Kind.COUNTED:
        return value if not value.is_decided else mixed(f"{step.label} makes data of the number of rows")
    value = _forgetful(value, step.outputs[index])
    if value.shape is None:
        return shared()
    turns = Dim(1, (f"{step.outputs[index]}|turns",))
    at = normal_axis(axis, len(value.shape) + 1)
    shape = (*value.shape[:at], turns, *value.shape[at:])
    if value.kind is Kind.SHARED:
        return shared(shape)
    return rowed(shape, value.axis + (at <= value.axis), value.outer, value.inner)


def scan(step: Step) -> list[Value]:
    """Scan: along any axis but that of the rows."""
    total = len(step.outputs)
    if step.opset < 9:
        return [unknown(f"{step.label}: of an opset before 9")] * total
    body, scans = step.attributes["body"], step.integer("num_scan_inputs", 1)
    values = step.given()
    state, scanned = values[: len(values) - scans], values[len(values) - scans :]
    axes = step.attributes.get("scan_input_axes", [0] * scans)
    sliced: list[Value] = []
    for value, given_axis in zip(scanned, axes, strict=True):
        if value.shape is None or value.kind is Kind.COUNTED:
            return [unknown(f"{step.label}: the rank is not known")] * total
        axis = normal_axis(int(given_axis), len(value.shape))
        shape = (*value.shape[:axis], *value.shape[axis + 1 :])
        if value.kind is Kind.ROWED:
            if axis == value.axis:
                return [mixed(f"{step.label} goes from row to row")] * total
            sliced.append(like(value, shape, value.axis - (axis < value.axis)))
        else:
            sliced.append(shared(shape))
    names = [each.name for each in body.input]
    state = [_forgetful(value, step.outputs[index]) for index, value in enumerate(state)]
    outputs: list[Value] = []
    for _ in range(_MOST_ROUNDS):
        outputs = step.analyse(body, dict(zip(names, [*state, *sliced], strict=True)))
        after = _after(step, state, outputs)
        if after == state:
            break
        state = after
    else:
        return [unknown(f"{step.label}: what it carries does not settle")] * total
    out_axes = step.attributes.get("scan_output_axes", [0] * (total - len(state)))
    collected = [
        _stacked(outputs[index], int(out_axes[index - len(state)]), step, index)
        for index in range(len(state), total)
    ]
    return [*state, *collected]


RULES: Final[dict[str, Rule]] = {"If": choice, "Loop": loop, "Scan": scan}
