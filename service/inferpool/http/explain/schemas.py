"""The answer of an explanation, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from inferpool.http.body_model import BodyModel


class Additivity(BodyModel):
    """Whether `base` and the contributions add up to `value`, within 1 % of it."""

    sum: float
    difference: float
    holds: bool


class HeatMap(BodyModel):
    """What the patches of a picture contribute, row by row; `patch` is the side of a patch in pixels."""

    height: int
    width: int
    patch: int
    contributions: list[list[float]]
    standard_errors: list[list[float | None]]


class Contribution(BodyModel):
    """What a column, a word or a token contributes.

    A column has `input`, the `index` in the row of this input if it has several values, and the name of its
    `column` if the request had a table. A word begins at `start` and ends at `end`, in characters.
    """

    input: str | None = None
    column: str | None = None
    index: list[int] | None = None
    last_index: list[int] | None = Field(None, description="The last of several values that are one feature.")
    text: int | None = Field(None, description="Of a pair of texts: 0 for the first, 1 for the second.")
    word: str | None = None
    start: int | None = None
    end: int | None = None
    contribution: float
    standard_error: float | None = Field(description="Of the sampling; null if it is not known.")


class ExplanationOut(BodyModel):
    """The explanation of a row: how `base`, the number with the baseline, becomes `value`, its own."""

    output: str
    index: int = Field(description="Which number of a row of the output is explained.")
    label: str | None
    scale: Literal["scores", "outputs"]
    value: float
    base: float
    baseline: str = Field(description="What replaced the features that were left out.")
    method: Literal["kernel", "permutation", "occlusion", "integrated-gradients"]
    passes: int = Field(description="Rows that the model ran.")
    steps: int | None = Field(None, description="Of integrated gradients: the points on the path.")
    exact: bool = Field(description="Whether the contributions are the exact Shapley values.")
    complete: bool = Field(description="Whether all passes were run before time was up.")
    additivity: Additivity
    kind: Literal["columns", "words", "tokens", "patches"]
    contributions: list[Contribution] | None = None
    heat_map: HeatMap | None = None


class ExplanationsOut(BodyModel):
    """The explanations of all rows of a request."""

    model: str
    version: str
    id: str
    seed: int
    explanations: list[ExplanationOut]
