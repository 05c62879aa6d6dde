"""Rules of operations along axes: reductions, sorting, normalisation."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.dims import ONE, product
from inferpool.backends.row_analysis.elementwise import combine
from inferpool.backends.row_analysis.step import Rule, Step, normal_axis
from inferpool.backends.row_analysis.values import Kind, Value, integers, like, mixed, shared, unknown


def _alone(step: Step) -> Value | None:
    """Return the result if the value has no rows, else None."""
    value = step.required(0)
    if value.kind is Kind.COUNTED:
        return mixed(f"{step.label} computes with the number of rows")
    if value.kind is Kind.SHARED:
        return shared(step.inferred())
    return unknown(f"{step.label}: the rank is not known") if value.shape is None else None


def reduction(step: Step) -> list[Value]:
    """Reduce…, ArgMax, ArgMin: over any axes but that of the rows."""
    value = step.required(0)
    if step.operation == "ReduceProd" and value.elements is not None:
        return [integers((product(value.elements),), (ONE,) if step.integer("keepdims", 1) else ())]
    done = _alone(step)
    if done is not None:
        return [done]
    assert value.shape is not None
    rank = len(value.shape)
    if step.operation in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [step.integer("axis", 0)]
    else:
        axes = step.numbers("axes", 1)
    if axes is None:
        return [unknown(f"{step.label}: the axes are not known before the model runs")]
    if not axes:
        if step.integer("noop_with_empty_axes", 0):
            return [value]
        return [mixed(f"{step.label} takes one value over the whole batch")]
    gone = {normal_axis(axis, rank) for axis in axes}
    if value.axis in gone:
        return [mixed(f"{step.label} takes one value over the rows")]
    if step.integer("keepdims", 1):
        return [like(value, tuple(ONE if axis in gone else dim for axis, dim in enumerate(value.shape)))]
    shape = tuple(dim for axis, dim in enumerate(value.shape) if axis not in gone)
    return [like(value, shape, value.axis - sum(axis < value.axis for axis in gone))]


def softmax(step: Step) -> list[Value]:
    """Softmax and its kin: along one axis, or before opset 13 over all axes from one on."""
    done = _alone(step)
    if done is not None:
        return [done]
    value = step.required(0)
    assert value.shape is not None
    rank = len(value.shape)
    late = step.opset >= 13
    axis = normal_axis(step.integer("axis", -1 if late else 1), rank)
    if value.axis == axis or (not late and value.axis >= axis):
        return [mixed(f"{step.label} normalises over the rows")]
    return [value]


def sorted_along(step: Step) -> list[Value]:
    """TopK: along any axis but that of the rows."""
    done = _alone(step)
    if done is not None:
        return [done] * len(step.outputs)
    value, count = step.required(0), step.input(1)
    assert value.shape is not None
    if count is not None and count.kind is not Kind.SHARED:
        return [mixed(f"{step.label}: how many depends on the rows")] * len(step.outputs)
    axis = normal_axis(step.integer("axis", -1), len(value.shape))
    if axis == value.axis:
        return [mixed(f"{step.label} sorts the rows")] * len(step.outputs)
    size = count.elements[0] if count is not None and count.elements else step.fresh(axis)
    return [like(value, (*value.shape[:axis], size, *value.shape[axis + 1 :]))] * len(step.outputs)


def along_axis(step: Step) -> list[Value]:
    """CumSum, LpNormalization, …: along one axis, by attribute or by the second input."""
    done = _alone(step)
    if done is not None:
        return [done]
    value = step.required(0)
    assert value.shape is not None
    if step.operation == "LpNormalization":
        axes: list[int] | None = [step.integer("axis", -1)]
    else:
        axes = step.numbers("axes", 1)
    if not axes:
        return [unknown(f"{step.label}: the axis is not known before the model runs")]
    if normal_axis(axes[0], len(value.shape)) == value.axis:
        return [mixed(f"{step.label} runs along the rows")]
    return [value]


def fourier(step: Step) -> list[Value]:
    """DFT: along one axis; the last axis has the parts of complex numbers."""
    done = _alone(step)
    if done is not None:
        return [done]
    value = step.required(0)
    assert value.shape is not None
    axes = step.numbers("axis", 2) if step.opset >= 20 else [step.integer("axis", 1)]
    length = step.input(1)
    if axes is None or (length is not None and length.kind is not Kind.SHARED):
        return [unknown(f"{step.label}: the axis or the length is not known before the model runs")]
    rank = len(value.shape)
    axis = normal_axis(axes[0] if axes else -2, rank)
    if value.axis in (axis, rank - 1):
        return [mixed(f"{step.label} transforms along the rows")]
    shape = tuple(step.fresh(at) if at in (axis, rank - 1) else dim for at, dim in enumerate(value.shape))
    return [like(value, shape)]


def layer_normalization(step: Step) -> list[Value]:
    """LayerNormalization and its kin: over all axes from one on."""
    done = _alone(step)
    if done is not None:
        return [done] * len(step.outputs)
    value = step.required(0)
    assert value.shape is not None
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [unknown(f"{step.label}: its weights depend on the rows")] * len(step.outputs)
    axis = normal_axis(step.integer("axis", -1), len(value.shape))
    if value.axis >= axis:
        return [mixed(f"{step.label} normalises over the rows")] * len(step.outputs)
    statistics = like(value, (*value.shape[:axis], *[ONE] * (len(value.shape) - axis)))
    return [value, *[statistics] * (len(step.outputs) - 1)]


def batch_normalization(step: Step) -> list[Value]:
    """BatchNormalization: by statistics that were learned; those of the batch itself mix its rows."""
    value = step.required(0)
    if step.integer("training_mode", 0) or (step.opset < 7 and not step.integer("is_test", 0)):
        return [mixed(f"{step.label} normalises by statistics of the batch")] * len(step.outputs)
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [unknown(f"{step.label}: its weights depend on the rows")] * len(step.outputs)
    if value.kind is Kind.ROWED and value.axis == 1:
        return [mixed(f"{step.label} takes the rows for channels")] * len(step.outputs)
    return [combine(step, [value]), *[shared()] * (len(step.outputs) - 1)]


def mean_variance_normalization(step: Step) -> list[Value]:
    """MeanVarianceNormalization: over axes that by default include the first."""
    done = _alone(step)
    if done is not None:
        return [done]
    value = step.required(0)
    assert value.shape is not None
    axes = [int(axis) for axis in step.attributes.get("axes", (0, 2, 3))]
    if value.axis in {normal_axis(axis, len(value.shape)) for axis in axes}:
        return [mixed(f"{step.label} normalises over the rows")]
    return [value]


RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(
        (
            "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
            "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "ArgMax", "ArgMin",
        ),
        reduction,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), softmax),
    **dict.fromkeys(("CumSum", "CumProd", "LpNormalization"), along_axis),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
         "com.microsoft.SimplifiedLayerNormalization"),
        layer_normalization,
    ),
    "TopK": sorted_along,
    "DFT": fourier,
    "BatchNormalization": batch_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
}  # fmt: skip
