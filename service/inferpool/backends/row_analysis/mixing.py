"""Operations whose definition mixes rows, or that have an answer of their own each time."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.step import Rule, Step
from inferpool.backends.row_analysis.values import Kind, Value, mixed, shared, unknown

MIXING: Final = {
    "DynamicQuantizeLinear": "takes one scale for all rows",
    "com.microsoft.DynamicQuantizeMatMul": "takes one scale for all rows",
    "com.microsoft.DynamicQuantizeLSTM": "takes one scale for all rows",
    "NonMaxSuppression": "lists the boxes of all rows one after another",
    "NonZero": "lists the elements of all rows one after another",
    "Unique": "compares the elements of all rows",
    "StringSplit": "makes every row as wide as the longest",
    "com.microsoft.Tokenizer": "makes every row as wide as the longest",
    "EyeLike": "numbers the rows",
}
"""The effect of each operation on rows. The name of the operation and this text make a sentence."""

RANDOM: Final = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)
"""Operations that draw random numbers."""


def mixing(step: Step) -> list[Value]:
    """The operation mixes rows if its inputs have any."""
    if all(value.kind is Kind.SHARED for value in step.given()):
        return [shared(step.inferred(index)) for index in range(len(step.outputs))]
    return [mixed(f"{step.label} {MIXING[step.operation]}")] * len(step.outputs)


def random(step: Step) -> list[Value]:
    """The operation draws random numbers."""
    return [unknown(f"{step.label} draws random numbers")] * len(step.outputs)


RULES: Final[dict[str, Rule]] = {**dict.fromkeys(MIXING, mixing), **dict.fromkeys(RANDOM, random)}
