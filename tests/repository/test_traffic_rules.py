"""What may be a canary or a shadow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from inferpool.errors import Conflict, InferpoolError, InvalidInput, VersionNotFound
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import LOADING, READY, ModelView, VersionView
from inferpool.repository.traffic import Canary, Shadow, traffic_from_json
from inferpool.repository.traffic_rules import plan_traffic
from inferpool.tensors import Signature, TensorSpec

X = TensorSpec("x", "FP32", (-1, 2))
SIGNATURE = Signature((X,), (TensorSpec("y", "FP32", (-1, 2)),))
OTHER = Signature((TensorSpec("x", "FP32", (-1, 3)),), (X,))


def model(**changes: Any) -> ModelView:
    """Versions 1 (stable), 2, 3 (loading) and 4 (other inputs)."""
    versions = {
        number: VersionView(VersionKey("m", number), READY, signature=SIGNATURE) for number in (1, 2, 3, 4)
    }
    versions[3] = replace(versions[3], state=LOADING)
    versions[4] = replace(versions[4], signature=OTHER)
    return replace(ModelView("m", "", versions, {"stable": 1}), **changes)


def plan(view: ModelView | None = None, **wanted: Any) -> Any:
    base: dict[str, Any] = {
        "canary": None, "share": 0.1, "by": "request_id", "least_requests": 100,
        "shadow": None, "shadow_share": 1.0,
    }  # fmt: skip
    return plan_traffic(model() if view is None else view, **base | wanted)


def test_a_canary_and_a_shadow_are_planned_beside_the_version_that_answers() -> None:
    found = plan(canary=2, by="header:X-User", shadow=2, shadow_share=0.5)
    assert found.canary == Canary(2, 1, 0.1, "header:x-user", 100)
    assert found.shadow == Shadow(2, 0.5)
    assert traffic_from_json(found.to_json()) == found
    assert plan(canary=2).number > found.number


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"canary": 9}, VersionNotFound, 'no version "9"'),
        ({"canary": 1}, Conflict, "answers already, and cannot be the canary"),
        ({"shadow": 1}, Conflict, "answers already, and cannot be the shadow"),
        ({"canary": 3}, Conflict, "is loading; load it first"),
        ({"canary": 4}, Conflict, "takes other inputs than version 1"),
        ({"shadow": 4}, Conflict, "takes other inputs than version 1"),
        ({"canary": 2, "share": 1.5}, InvalidInput, "expected a number from 0 to 1"),
        ({"canary": 2, "share": float("nan")}, InvalidInput, "expected a number from 0 to 1"),
        ({"canary": 2, "share": 0.0}, InvalidInput, "cannot be compared"),
        ({"canary": 2, "least_requests": -1}, InvalidInput, "-1 requests"),
        ({"shadow": 2, "shadow_share": 0.0}, InvalidInput, "above 0"),
        ({"canary": 2, "by": "weather"}, InvalidInput, 'by "weather"'),
        ({"canary": 2, "by": "header:"}, InvalidInput, "header:NAME"),
        ({"canary": 2, "by": "header:a b"}, InvalidInput, "header:NAME"),
        ({"canary": 2, "by": "header:Authorization"}, InvalidInput, "holds a secret"),
    ],
)
def test_what_cannot_be_is_refused(wanted: dict[str, Any], error: type[InferpoolError], said: str) -> None:
    with pytest.raises(error, match="(?s)" + said.replace("(", r"\(")):
        plan(**wanted)


def test_people_may_end_a_canary_with_any_share() -> None:
    assert plan(canary=2, share=1.0, least_requests=0).canary.share == 1
    assert plan(canary=2, share=0.0, least_requests=0).canary.share == 0


def test_without_a_ready_version_there_is_nothing_to_share_out() -> None:
    loading = {1: replace(model().versions[1], state=LOADING)}
    with pytest.raises(Conflict, match="no version that is ready"):
        plan(model(versions=loading), canary=1)
