"""Operations whose definition mixes rows, or that have an answer of their own each time."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from inferpool.backends.row_analysis.dims import ONE
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


def tokenise(step: Step) -> list[Value]:
    """Tokenizer: a table as wide as the longest row, with the other rows filled up."""
    (result,) = mixing(step)
    text = step.required(0)
    filler = step.attributes.get("pad_value")
    if result.kind is Kind.MIXED and text.kind is Kind.ROWED and filler is not None:
        one_text = text.shape is not None and not text.axis and all(dim == ONE for dim in text.shape[1:])
        if one_text and text.outer == ONE and text.inner == ONE:
            return [replace(result, filler=filler)]
    return [result]


def random(step: Step) -> list[Value]:
    """The operation draws random numbers."""
    return [unknown(f"{step.label} draws random numbers")] * len(step.outputs)


RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(MIXING, mixing),
    "com.microsoft.Tokenizer": tokenise,
    **dict.fromkeys(RANDOM, random),
}
