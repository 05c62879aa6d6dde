"""What a request for an explanation may choose, in the query of its address, whatever its body is."""

from __future__ import annotations

from typing import Annotated, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field

from inferpool.errors import InvalidInput
from inferpool.explain.integrated_gradients import INTEGRATED_GRADIENTS
from inferpool.http.body_model import BodyModel

USUAL_PASSES: Final = 1100
"""Enough for the exact values of ten features, which have 1022 coalitions."""
AUTO: Final = "auto"
CONTINUOUS: Final = ("FP16", "BF16", "FP32", "FP64")
"""The datatypes of inputs and outputs that have gradients."""
OTHER_METHODS: Final = "choose the method kernel, permutation or occlusion"


class ExplanationLimits(NamedTuple):
    """The `passes` and `seconds` that an explanation may take; 0 passes switch explanations off."""

    passes: int
    seconds: float


class ExplainQuery(BodyModel):
    """What is explained, and how."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["auto", "kernel", "permutation", "occlusion", "integrated-gradients"] = Field(
        default=AUTO,
        description="`kernel` and `permutation` estimate Shapley values, `occlusion` leaves out one feature"
        " at a time, `integrated-gradients` sums up the gradients of a PyTorch model; `auto` is `kernel` if"
        " there are enough passes for it.",
    )
    target: Annotated[str, Field(max_length=1000)] | None = Field(
        default=None,
        description="Label or index of the number that is explained; by default the largest of the output.",
    )
    output: Annotated[str, Field(max_length=1000)] | None = Field(
        default=None, description="The output; by default that of the labels, else the first with numbers."
    )
    scale: Literal["scores", "outputs"] | None = Field(
        default=None,
        description="Whether the number of an output with labels is its score, as in `predictions`, or the"
        " output itself; by default `scores`, for `integrated-gradients` always `outputs`.",
    )
    baseline: (
        Literal["samples-mean", "samples", "zeros", "mean-colour", "blur", "mask", "unknown", "padding"]
        | None
    ) = Field(default=None, description="What replaces a feature that is left out.")
    passes: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="Rows that the model runs at most, for all rows of the request together."
    )
    budget_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Milliseconds after which the explanation is made of what has been run."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="The same seed gives the same answer, unless time runs out."
    )
    patch: Annotated[int, Field(ge=1, le=16_384)] | None = Field(
        default=None, description="The side of a patch of a picture, in pixels; by default an eighth."
    )

    @property
    def takes_scores(self) -> bool:
        """Whether the score of a label is explained, and not the output itself."""
        if self.scale is None:
            return self.method != INTEGRATED_GRADIENTS
        return self.scale == "scores"

    def passes_of(self, most: int) -> int:
        """Return how many passes the request may take; raises InvalidInput if it asks for over `most`."""
        if self.passes is None:
            return min(USUAL_PASSES, most)
        if self.passes > most:
            raise InvalidInput(
                f'"passes" is {self.passes}; this server runs at most {most} for one explanation',
                field="passes",
                expected=most,
                got=self.passes,
            )
        return self.passes
