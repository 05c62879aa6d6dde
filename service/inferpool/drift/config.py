"""The table `[drift]` of a `model.toml`: how requests are compared with the version's profile."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from inferpool.privacy.noise import LEAST_EPSILON, MOST_EPSILON


class DriftConfig(BaseModel):
    """`[drift]`: used if the version's folder has a `profile.json`, which `inferpool profile` writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(default=True, description="`false` compares nothing, although there is a profile.")
    window_s: Annotated[float, Field(ge=5, le=86_400, allow_inf_nan=False)] = Field(
        default=600.0, description="Seconds whose rows are counted together and compared with the profile."
    )
    requests_per_s: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = Field(
        default=20.0, description="Requests that a web process counts in a second at most, 64 rows of each."
    )
    epsilon: Annotated[float, Field(ge=LEAST_EPSILON, le=MOST_EPSILON)] = Field(
        default=1.0, description="Noise of the counts of a field: a row is hidden by this epsilon."
    )
    series: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="Fields that have metrics of their own, beside the largest distance of all fields.",
    )
