"""`/metrics` is well formed and says the same in both formats."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.observe.families import FAMILIES
from inferpool.observe.metrics import PIECE_NUMBERS, Metrics
from inferpool.observe.metrics_page import MetricsPage
from inferpool.system import cpu_pace
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.server import Server

OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
ROWS = {"inputs": [[0.0] * 10]}


def test_both_formats_say_the_same(bundled: Server) -> None:
    """The strict parsers of Prometheus' client find every family in both formats, with equal samples."""
    bundled.post("/predict/diabetes", json=ROWS)
    text, openmetrics = bundled.get("/metrics"), bundled.get("/metrics", headers=OPENMETRICS)
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    samples = []
    for parse, answer in ((parse_text, text), (parse_openmetrics, openmetrics)):
        families = [family for family in parse(answer.text) if family.name.startswith("inferpool_")]
        names = {family.name.removesuffix("_info") for family in families}
        assert names == {family.full_name.removesuffix("_info").removesuffix("_total") for family in
                         FAMILIES.values()}  # fmt: skip
        samples.append(
            {
                (s.name, *sorted(s.labels.items())): s.value
                for family in families
                for s in family.samples
                # These change with each scrape.
                if s.name not in ("inferpool_web_busy_seconds_total", "inferpool_memory_held_bytes")
            }
        )
    assert samples[0] == samples[1]


def test_no_version_is_answered_that_the_server_does_not_write(bundled: Server) -> None:
    asked = {"Accept": "application/openmetrics-text;version=9.9.9;escaping=x"}
    answer = bundled.get("/metrics", headers=asked)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# EOF" not in answer.text
    asked["Accept"] += ",application/openmetrics-text;version=0.0.1;q=0.5"
    answer = bundled.get("/metrics", headers=asked)
    assert answer.headers["content-type"] == "application/openmetrics-text; version=0.0.1; charset=utf-8"
    assert answer.text.endswith("# EOF\n")


def test_the_page_is_compressed_if_the_scraper_accepts_it(bundled: Server) -> None:
    plain = bundled.get("/metrics", headers={"accept-encoding": "identity"})
    packed = bundled.get("/metrics", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 5
    assert packed.text.splitlines()[0] == plain.text.splitlines()[0]


def test_a_version_has_at_most_sixty_series(bundled: Server) -> None:
    bundled.post("/predict/diabetes", json=ROWS)
    bundled.post("/predict/next-word", json={"inputs": ["It is"]})
    versions = Counter(
        (sample.labels["model"], sample.labels["version"])
        for family in parse_text(bundled.get("/metrics").text)
        for sample in family.samples
        if sample.labels.get("version") and sample.name.startswith("inferpool_") and "model" in sample.labels
    )
    assert {model for model, _ in versions} >= {"diabetes", "next-word"}
    assert max(versions.values()) <= 60, versions


def test_a_sampled_trace_becomes_an_exemplar(bundled: Server) -> None:
    """The bucket that counted the request has its trace id as an exemplar, in OpenMetrics only."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    assert bundled.post("/predict/digits", json={"inputs": [[[[0.0] * 8] * 8]]}, headers=headers).is_success
    found = [
        (sample.name, sample)
        for family in parse_openmetrics(bundled.get("/metrics", headers=OPENMETRICS).text)
        for sample in family.samples
        if sample.exemplar is not None
    ]
    kinds = ("request", "queue", "compute")
    assert {name for name, _ in found} == {f"inferpool_{kind}_duration_seconds_bucket" for kind in kinds}
    for _, sample in found:
        assert sample.exemplar.labels == {"trace_id": trace}
        assert sample.exemplar.value <= float(sample.labels["le"])
        assert sample.value >= 1
    assert trace not in bundled.get("/metrics").text


@pytest.mark.parametrize(
    "value",
    [
        "00-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b7-00",  # valid, but not sampled
        "00-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b7",
        "00-4BF92F3577B34DA6A3CE929D0E0E4737-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4737-0000000000000000-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b7-01-more",
        '00-4bf92f3577b34da6a3ce929d0e0e473"-00f067aa0ba902b7-01',
    ],
)
def test_an_invalid_or_unsampled_trace_becomes_no_exemplar(value: str, bundled: Server) -> None:
    """An invalid `traceparent` is ignored, and the request is answered."""
    assert bundled.post("/predict/diabetes", json=ROWS, headers={"traceparent": value}).is_success
    assert "4bf92f3577b34da6a3ce929d0e0e473" not in bundled.get("/metrics", headers=OPENMETRICS).text.replace(
        "4bf92f3577b34da6a3ce929d0e0e4736", ""
    )


def test_the_counters_of_a_version_start_at_0(bundled: Server) -> None:
    """The series exist before any request, because a rate misses the first request of a new series."""
    families = list(parse_text(bundled.get("/metrics").text))
    values = {
        (sample.name, sample.labels.get("code")): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("model") == "diabetes"
    }
    assert values["inferpool_requests_total", "503"] == 0
    assert ("inferpool_dropped_entries_total", None) in values
    assert ("inferpool_batches_total", None) in values


labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
durations = st.floats(0, 100)


@given(model=labels, amounts=st.lists(durations, max_size=30), count=st.integers(0, 10**12))
def test_rendered_metrics_are_parsed_back(model: str, amounts: list[float], count: int) -> None:
    """A parser reads back every model name and every measurement."""
    metrics = Metrics({"version": model})
    distribution = metrics.distribution("request_duration_seconds", model, "1")
    for amount in amounts:
        distribution.observe(amount)
    metrics.value("requests_total", model, "1", "200").add(count)
    metrics.add_source(lambda: [("queue_rows", (model, "1"), 3.0)])
    for parse, accept in ((parse_text, ""), (parse_openmetrics, OPENMETRICS["Accept"])):
        samples = {
            (sample.name, sample.labels.get("le")): sample
            for family in parse(MetricsPage(metrics).render(accept)[0].decode())
            for sample in family.samples
            if sample.labels.get("model") == model or sample.labels.get("version") == model
        }
        name = "inferpool_request_duration_seconds"
        assert samples["inferpool_requests_total", None].value == count
        assert samples["inferpool_queue_rows", None].value == 3
        assert samples["inferpool_build_info", None].value == 1
        assert samples[f"{name}_count", None].value == len(amounts)
        assert math.isclose(samples[f"{name}_sum", None].value, sum(amounts), rel_tol=1e-9, abs_tol=1e-12)
        for bound in (0.001, 0.25, 4.0):
            expected = sum(amount <= bound for amount in amounts)
            assert samples[f"{name}_bucket", str(bound)].value == expected
        assert samples[f"{name}_bucket", "+Inf"].value == len(amounts)


def metrics_of_150_versions() -> Metrics:
    metrics = Metrics({"version": "0"})
    for number in range(150):
        metrics.add_version(f"model-{number}", "1")
        for reason in ("instance_free", "full", "deadline"):
            metrics.value("batches_total", f"model-{number}", "1", "cpu", reason).add()
    metrics.add_source(
        lambda: [
            ("model_state", (f"model-{number}", "1", state), 1.0)
            for number in range(150)
            for state in ("loading", "ready", "unloading", "failed")
        ]
    )
    return metrics


def test_a_scrape_of_150_versions_lets_other_threads_run_after_each_small_piece() -> None:
    """Compiled code releases the GIL only where it says so, and the event loop needs it for each request."""
    pieces: list[float] = []
    ran = 0.0

    def rest() -> None:
        nonlocal ran
        now = time.thread_time()
        pieces.append(now - ran)
        ran = now

    page = MetricsPage(metrics_of_150_versions(), rest)
    page.render("")  # makes what all later scrapes use
    longest = []
    for _ in range(3):
        pieces.clear()
        ran = time.thread_time()
        text, _ = page.render("")
        rest()
        # The numbers are read, family by family, and then written.
        assert len(pieces) > text.count(b"\n") / PIECE_NUMBERS
        longest.append(max(pieces))
    assert min(longest) < 0.01, longest


def test_a_server_that_uses_its_whole_quota_is_scraped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prometheus waits for ten seconds, also if there are hundreds of versions."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = cpu_pace.CpuPace(1.0, lambda: now, lambda: now, sleep)
    sleep(10)
    monkeypatch.setattr(cpu_pace, "PACE", pace)
    MetricsPage(metrics_of_150_versions()).render("")
    assert 10 < now < 10.5


def test_a_page_of_few_versions_is_made_in_one_piece() -> None:
    metrics, rests = Metrics({"version": "0"}), list[None]()
    for number in range(4):
        metrics.add_version(f"model-{number}", "1")
    MetricsPage(metrics, lambda: rests.append(None)).render("")
    assert len(rests) <= 1


def test_a_scrape_of_150_versions_takes_little_of_the_processor() -> None:
    page = MetricsPage(metrics_of_150_versions())
    page.render("")  # makes what all later scrapes use

    def scrape() -> float:
        began = time.thread_time()
        text, _ = page.render("")
        assert text.count(b'{model="model-7",') >= 40
        return time.thread_time() - began

    assert min(scrape() for _ in range(3)) < 0.05
