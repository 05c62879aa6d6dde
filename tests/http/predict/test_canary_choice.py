"""Which requests are a canary's: a caller stays on one side, and the share is right."""

from __future__ import annotations

from typing import cast

import pytest
from inferpool.http.access.caller import PREDICT, Caller
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.canary_choice import CanaryChoice, trial_metrics
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.request_metrics import RequestStats
from inferpool.http.predict.resolver import Resolver
from inferpool.http.predict.served_version import ServedVersion
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Result, VersionKey
from inferpool.repository.catalog import READY, Catalog, ModelView, VersionView
from inferpool.repository.rollout_policy import TrialCounts
from inferpool.repository.traffic import Canary, Traffic
from inferpool.repository.traffic_figures import trial_counts
from inferpool.tensors import Signature, TensorSpec

SPEC = TensorSpec("x", "FP32", (-1, 2))
VIEWS = {
    number: VersionView(VersionKey("m", number), READY, signature=Signature((SPEC,), (SPEC,)))
    for number in (1, 2)
}
CALLERS = 4000


def choice(share: float, by: str = "header:x-user", version: int = 2) -> CanaryChoice:
    metrics = Metrics({})
    stable, canary = (
        ServedVersion(view, trial_metrics(metrics, view.key, RequestStats(), 1)) for view in VIEWS.values()
    )
    return CanaryChoice(stable, canary, Canary(version, 1, share, by))


def request(user: str | None = None, key: str = "", tenant: str = "", given: str = "") -> PredictContext:
    headers = [(b"x-request-id", given.encode())] if given else []
    head = RequestHead("m", None, headers)
    if user is not None:
        head.keep(frozenset({b"x-user"}), [(b"x-user", user.encode()), (b"x-other", b"1")])
    context = PredictContext(NATIVE_API, head, 0.0)
    context.caller = Caller(tenant, key, PREDICT)
    return context


def canaries(chosen: CanaryChoice) -> set[int]:
    return {n for n in range(CALLERS) if chosen.choose(request(user=f"u{n}")) is chosen.canary}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_the_share_is_right_and_callers_stay_on_their_side(share: float) -> None:
    found = canaries(choice(share))
    assert len(found) / CALLERS == pytest.approx(share, abs=0.03)
    assert canaries(choice(share)) == found


def test_a_larger_share_keeps_its_callers_and_another_canary_gets_others() -> None:
    few = canaries(choice(0.1))
    assert few < canaries(choice(0.3))
    other = canaries(choice(0.1, version=3))
    assert len(other & few) < len(few) / 2


@pytest.mark.parametrize(
    ("by", "name"), [("key", "key"), ("tenant", "tenant"), ("request_id", "given"), ("header:x-user", "user")]
)
def test_every_kind_of_name_decides(by: str, name: str) -> None:
    chosen = choice(0.5, by)
    sides = [chosen.choose(request(**{name: f"name{n}"})) for n in range(64)]
    assert {chosen.stable, chosen.canary} == set(sides)
    assert sides == [chosen.choose(request(**{name: f"name{n}"})) for n in range(64)]


@pytest.mark.parametrize("by", ["key", "tenant", "header:x-user"])
def test_a_request_that_does_not_say_who_sends_it_goes_to_the_stable_version(by: str) -> None:
    chosen = choice(1.0, by)
    assert chosen.choose(request()) is chosen.stable


def test_only_errors_of_the_server_count_and_only_in_their_trial() -> None:
    metrics, key = Metrics({}), VersionKey("m", 2)
    counted = trial_metrics(metrics, key, RequestStats(), 1)
    for status, code in (
        (422, "invalid_input"), (422, "model_rejected"), (429, "queue_full"), (503, "not_ready"),
        (504, "deadline_exceeded"), (413, "body_too_large"), (429, "rate_limited"),
    ):  # fmt: skip
        counted.failed(status, 0.1, code, by_server=status >= 500)
    assert trial_counts(metrics, "m", 2, 1) == TrialCounts()
    for code in ("model_failed", "model_crashed", "run_timeout", "internal_error"):
        counted.failed(500, 0.1, code, by_server=True)
    counted.succeeded(1, 0.0, 0.0, 9.0, 1.0, Result(1, {}, None, 0.001, 0.002, 1))
    counted.succeeded(1, 0.0, 0.0, 9.0, 1.0, Result(2, {}, None, 0.0))  # from the cache
    found = trial_counts(metrics, "m", 2, 1)
    assert (found.failures, found.answered) == (4, 1)
    # Nine seconds, most of which the client took to send its body.
    assert found.quantile_s(1.0) == pytest.approx(0.003, rel=0.25)
    trial_metrics(metrics, key, RequestStats(), 2)
    counted.failed(500, 0.1, "model_failed", by_server=True)
    assert trial_counts(metrics, "m", 2, 2) == TrialCounts()
    assert metrics.total("request_duration_seconds", "m", "2")[-1] > 9


class Published:
    def __init__(self) -> None:
        self.published: dict[str, ModelView] = {}

    def models(self) -> dict[str, ModelView]:
        return self.published


def test_a_request_that_names_a_version_is_never_diverted() -> None:
    catalog = Published()
    resolver = Resolver(cast("Catalog", catalog), Metrics({}))
    cleared: list[frozenset[bytes]] = []
    resolver.on_choice_headers = lambda: cleared.append(resolver.choice_headers)
    labels = {"stable": 1}
    model = ModelView("m", "", VIEWS, labels, None, Traffic(1, Canary(2, 1, 1.0, "header:x-user")))
    catalog.published = {"m": model}
    assert resolver.find("m", None, request(user="a")).version == "2"
    assert resolver.find("m", None, request()).version == "1"
    assert resolver.find("m", None).version == "1"
    for name in ("1", "stable"):
        assert resolver.find("m", name, request(user="a")).version == "1"
    assert resolver.find("m", "2", request(user="a")).version == "2"
    assert cleared == [frozenset({b"x-user"})]
    ended = Traffic(1, Canary(2, 1, 1.0, "header:x-user", state="rolled_back"))
    catalog.published = {"m": ModelView("m", "", VIEWS, labels, None, ended)}
    assert resolver.find("m", None, request(user="a")).version == "1"
    assert cleared[1:] == [frozenset()]
