"""The bodies of the traffic routes: a model's canary and shadow, with what is counted of them."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from inferpool.http.body_model import BodyModel
from inferpool.observe.metrics import Metrics
from inferpool.repository.catalog import ModelView
from inferpool.repository.rollout_policy import TrialCounts
from inferpool.repository.traffic import BY_REQUEST, Canary, Shadow
from inferpool.repository.traffic_figures import shadow_figures, trial_counts


class _Body(BodyModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CanaryBody(_Body):
    """A version that is to answer a share of the requests that name no version."""

    version: int = Field(ge=1)
    share: float = Field(description="From 0 to 1.")
    by: str = Field(
        BY_REQUEST,
        description="Whose hash decides, so that a caller stays on one side: `request_id`, `key`, `tenant`"
        " or `header:NAME`. Requests without a key or that header go to the stable version.",
    )
    requests: int = Field(
        1000,
        description="The server rolls the canary back once it is certainly worse, and promotes it once both"
        " versions have answered so many requests and it is not worse; 0 leaves both to people.",
    )


class ShadowBody(_Body):
    """A version that is to get copies of requests, whose answers are compared and not sent."""

    version: int = Field(ge=1)
    share: float = Field(1.0, description="The share of requests that are copied: above 0, at most 1.")


class TrafficBody(_Body):
    """How the requests for a model are to be shared out; what is null ends."""

    canary: CanaryBody | None = None
    shadow: ShadowBody | None = None


class TrialOut(BodyModel):
    """What one of the two versions has done: errors that clients cause are not counted.

    The times are those in the queue and in the model, without the client's connection.
    """

    version: int
    requests: int
    failures: int
    p50_ms: float | None
    p99_ms: float | None


class CanaryOut(BodyModel):
    """A canary, and how it compares with the stable version."""

    version: int
    share: float
    by: str
    requests: int
    state: Literal["running", "promoted", "rolled_back", "ended"]
    reason: str
    canary: TrialOut
    stable: TrialOut


class OutputDifferenceOut(BodyModel):
    """How the numbers of an output differ from those that were sent.

    `non_finite` counts numbers of which one only is finite; the other figures are without them.
    """

    name: str
    largest: float
    mean: float
    numbers: int
    non_finite: int


class ShadowOut(BodyModel):
    """A shadow, and how its answers compare with those that were sent.

    `unlike` counts answers with other outputs or shapes, `dropped` copies for which the server was too busy.
    `changed_labels` is the share of rows whose best label has changed; null without labels. `sent_ms` and
    `copy_ms` are the means of the pairs, and `slower` is the share of pairs whose copy took longer.
    """

    version: int
    share: float
    compared: int
    failed: int
    dropped: int
    unlike: int
    changed_labels: float | None
    sent_ms: float | None
    copy_ms: float | None
    slower: float | None
    outputs: list[OutputDifferenceOut]


class TrafficOut(BodyModel):
    """How the requests for a model are shared out: null for what there is not."""

    canary: CanaryOut | None
    shadow: ShadowOut | None


def traffic_out(model: ModelView, metrics: Metrics) -> TrafficOut:
    """The response body for a model's traffic."""
    traffic = model.traffic
    if traffic is None:
        return TrafficOut(canary=None, shadow=None)
    return TrafficOut(
        canary=_canary(model.name, traffic.canary, traffic.number, metrics),
        shadow=_shadow(model.name, traffic.shadow, traffic.number, metrics),
    )


def _canary(model: str, canary: Canary | None, number: int, metrics: Metrics) -> CanaryOut | None:
    if canary is None:
        return None
    return CanaryOut(
        version=canary.version,
        share=canary.share,
        by=canary.by,
        requests=canary.least_requests,
        state=canary.state,
        reason=canary.reason,
        canary=_trial(canary.version, trial_counts(metrics, model, canary.version, number)),
        stable=_trial(canary.stable, trial_counts(metrics, model, canary.stable, number)),
    )


def _trial(version: int, counts: TrialCounts) -> TrialOut:
    return TrialOut(
        version=version,
        requests=counts.requests,
        failures=counts.failures,
        p50_ms=_ms(counts.quantile_s(0.5)),
        p99_ms=_ms(counts.quantile_s(0.99)),
    )


def _shadow(model: str, shadow: Shadow | None, number: int, metrics: Metrics) -> ShadowOut | None:
    if shadow is None:
        return None
    found = shadow_figures(metrics, model, shadow.version, number)
    pairs = found.compared
    return ShadowOut(
        version=shadow.version,
        share=shadow.share,
        compared=pairs,
        failed=found.failed,
        dropped=found.dropped,
        unlike=found.unlike,
        changed_labels=found.changed_rows / found.label_rows if found.label_rows else None,
        sent_ms=_ms(found.sent_s / pairs) if pairs else None,
        copy_ms=_ms(found.copy_s / pairs) if pairs else None,
        slower=found.slower / pairs if pairs else None,
        outputs=[
            OutputDifferenceOut(
                name=name,
                largest=each.largest,
                mean=each.mean,
                numbers=each.numbers,
                non_finite=each.non_finite,
            )
            for name, each in found.outputs.items()
        ],
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 4)
