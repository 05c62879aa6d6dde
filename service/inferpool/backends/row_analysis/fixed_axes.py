"""Rules of operations whose inputs and outputs have the batch on an axis that their definition fixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from inferpool.backends.row_analysis.dims import Dim
from inferpool.backends.row_analysis.step import Rule, Step
from inferpool.backends.row_analysis.values import Kind, Value, mixed, rowed, shared, unknown


@dataclass(frozen=True, slots=True)
class Axes:
    """Where an operation has its batch.

    Attributes:
        inputs: the batch axis of each input that may have rows, by the input's index.
        outputs: the batch axis of each output, by the output's index.
        shared_too: inputs among `inputs` that may also be shared by all rows.
        least_rank: the smallest rank of the first input for which the first axis is the batch.
        ranks: the rank of each output that shape inference does not know, by the output's index.
    """

    inputs: Mapping[int, int]
    outputs: Mapping[int, int]
    shared_too: frozenset[int] = field(default_factory=frozenset)
    least_rank: int = 1
    ranks: Mapping[int, int] = field(default_factory=dict)


def _width(step: Step) -> int | None:
    """Return how many numbers an ensemble of trees or a linear regression has for each row, if it says."""
    if step.operation.endswith("Regressor"):
        return step.integer("n_targets", step.integer("targets", 1))
    if step.operation == "ai.onnx.ml.TreeEnsembleClassifier":
        names = ("classlabels_int64s", "classlabels_strings")
        return next((len(step.attributes[name]) for name in names if step.attributes.get(name)), None)
    return None


def by_axes(step: Step, axes: Axes) -> list[Value]:
    """Return the outputs of an operation that treats each index of its batch axis on its own."""
    count = len(step.outputs)
    first: Value | None = None
    for index, value in enumerate(step.inputs):
        if value is None or value.kind is Kind.SHARED:
            continue
        if value.kind is Kind.COUNTED:
            return [mixed(f"{step.label} computes with the number of rows")] * count
        if index not in axes.inputs:
            return [unknown(f"{step.label}: its input {index + 1} depends on the rows")] * count
        if value.axis != axes.inputs[index]:
            return [mixed(f"{step.label} has the rows on another axis than its batch")] * count
        if first is not None and not value.lies_as(first):
            return [unknown(f"{step.label} combines rows that are arranged differently")] * count
        first = first or value
    if first is None:
        return [shared(step.inferred(index)) for index in range(count)]
    if step.inputs[0] is None or (step.inputs[0].rank or 0) < axes.least_rank:
        return [unknown(f"{step.label}: the rank of its input is not one with a batch")] * count
    for index in axes.inputs:
        value = step.input(index)
        if value is not None and value.kind is Kind.SHARED and index not in axes.shared_too:
            return [unknown(f"{step.label}: its input {index + 1} is the same for all rows")] * count
    results: list[Value] = []
    for index in range(count):
        axis = axes.outputs.get(index)
        shape = step.inferred(index)
        if shape is None and index in axes.ranks:
            shape = tuple(step.fresh(number, index) for number in range(axes.ranks[index]))
            width = _width(step)
            if width is not None and axes.ranks[index] == 2:
                shape = (shape[0], Dim(width))
        if axis is None or shape is None or axis >= len(shape):
            results.append(unknown(f"{step.label}: the rank of its output {index + 1} is not known"))
        else:
            results.append(rowed(shape, axis, first.outer, first.inner))
    return results


def rule_of(axes: Axes) -> Rule:
    """Return the rule of an operation with these axes."""
    return lambda step: by_axes(step, axes)


def recurrent(step: Step) -> list[Value]:
    """LSTM, GRU, RNN: the batch is the second axis, or the first with `layout` 1."""
    first = step.integer("layout", 0)
    batch, state = (0, 0) if first else (1, 1)
    return by_axes(
        step,
        Axes(
            inputs={0: batch, 4: 0, 5: state, 6: state},
            outputs={0: 0 if first else 2, 1: state, 2: state},
            least_rank=3,
        ),
    )


def _first(*inputs: int, shared_too: tuple[int, ...] = (), outputs: int = 1, least_rank: int = 2) -> Axes:
    return Axes(dict.fromkeys(inputs, 0), dict.fromkeys(range(outputs), 0), frozenset(shared_too), least_rank)


_IMAGE: Final = Axes({0: 0}, {0: 0, 1: 0}, least_rank=3)
_TABLE: Final = Axes({0: 0}, {0: 0}, least_rank=2, ranks={0: 2})
_CLASSES: Final = Axes({0: 0}, {0: 0, 1: 0}, least_rank=2, ranks={0: 1, 1: 2})
_SKIP: Final = Axes({0: 0, 1: 0}, {0: 0, 1: 0, 2: 0, 3: 0}, least_rank=3, ranks={0: 3, 3: 3})
_ATTENTION: Final = _first(*range(10), shared_too=tuple(range(3, 10)), outputs=4, least_rank=3)

RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "AveragePool", "MaxPool", "LpPool",
         "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "InstanceNormalization", "GroupNormalization",
         "LRN", "DepthToSpace", "SpaceToDepth", "Col2Im", "com.microsoft.FusedConv",
         "com.microsoft.QLinearAveragePool", "com.microsoft.QLinearGlobalAveragePool"),
        rule_of(_IMAGE),
    ),
    "DeformConv": rule_of(_first(0, 2, 4, shared_too=(4,), least_rank=4)),
    "GridSample": rule_of(_first(0, 1, least_rank=4)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent),
    "Attention": rule_of(_ATTENTION),
    "RotaryEmbedding": rule_of(_first(0, 3, shared_too=(3,), least_rank=3)),
    "com.microsoft.Attention": rule_of(
        Axes({0: 0, 3: 0, 4: 0, 5: 0}, {0: 0}, frozenset({3, 5}), least_rank=3, ranks={0: 3})
    ),
    "com.microsoft.MultiHeadAttention": rule_of(
        Axes(dict.fromkeys(range(8), 0), {0: 0}, frozenset(range(3, 8)), least_rank=3, ranks={0: 3})
    ),
    "com.microsoft.SkipLayerNormalization": rule_of(_SKIP),
    "com.microsoft.SkipSimplifiedLayerNormalization": rule_of(_SKIP),
    "com.microsoft.EmbedLayerNormalization": rule_of(
        Axes({0: 0, 1: 0, 7: 0, 8: 0}, {0: 0, 1: 0, 2: 0}, frozenset({1, 7, 8}), 2, {0: 3, 1: 1, 2: 3})
    ),
    **dict.fromkeys(
        ("ai.onnx.ml.LinearRegressor", "ai.onnx.ml.SVMRegressor", "ai.onnx.ml.TreeEnsembleRegressor",
         "ai.onnx.ml.TreeEnsemble", "ai.onnx.ml.Normalizer", "ai.onnx.ml.Imputer", "ai.onnx.ml.Scaler"),
        rule_of(_TABLE),
    ),
    **dict.fromkeys(
        ("ai.onnx.ml.LinearClassifier", "ai.onnx.ml.SVMClassifier", "ai.onnx.ml.TreeEnsembleClassifier"),
        rule_of(_CLASSES),
    ),
}  # fmt: skip
