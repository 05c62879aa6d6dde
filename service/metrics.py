"""What is counted, and how Prometheus reads it.

A request may cost one microsecond of metrics, so the values are plain numbers: no lock, no label
lookup. Each value has one writer at a time (the event loop for what is counted per request, the pool
under its lock for what is counted per batch), and whoever writes holds the value itself, looked up once
a version. `prometheus_client` renders them when they are scraped, as text or OpenMetrics.

`FAMILIES` is the table of everything exported; the README's table is checked against it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

SECONDS_BUCKETS: Final = (
    0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.004, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06,
    0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Upper bounds for durations: steps of about 1.6, from half a millisecond to half a minute."""

ROWS_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds for rows a batch."""


class Value:
    """A number that one writer changes and any thread may read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        self.value += amount


class Distribution:
    """A histogram that one writer observes into and any thread may read."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, amount: float) -> None:
        """Count `amount` in the bucket of the first bound that is not below it."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.sum += amount

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        total, cumulative = 0, []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            cumulative.append((bound, float(total)))
        return cumulative


@dataclass(frozen=True, slots=True)
class Family:
    """One exported metric: its name without the prefix, its kind, its labels, and what it says."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """The name as it is scraped, `_total` included."""
        return "inferpool_" + self.name


_VERSION: Final = ("model", "version")

FAMILIES: Final = {
    family.name: family
    for family in (
        Family("requests_total", "counter", (*_VERSION, "code"),
               "Predict requests answered, by HTTP status."),
        Family("request_duration_seconds", "histogram", _VERSION,
               "From the request's head to its answer, good ones and bad.", SECONDS_BUCKETS),
        Family("queue_duration_seconds", "histogram", _VERSION,
               "From the offer to the queue until an instance took the request.", SECONDS_BUCKETS),
        Family("compute_duration_seconds", "histogram", _VERSION,
               "The run of the batch that the request was in.", SECONDS_BUCKETS),
        Family("batch_rows", "histogram", _VERSION, "Rows of each batch that ran.", ROWS_BUCKETS),
        Family("batches_total", "counter", (*_VERSION, "device", "reason"),
               "Batches that ran, by why they were no larger."),
        Family("padded_tokens_total", "counter", _VERSION,
               "Tokens that filled rows up to the longest of their batch."),
        Family("queue_rows", "gauge", _VERSION, "Rows that wait now."),
        Family("queue_oldest_age_seconds", "gauge", _VERSION, "How long the oldest entry has waited."),
        Family("in_flight_requests", "gauge", (), "Predict requests being read, run or answered now."),
        Family("instance_busy_seconds_total", "counter", (*_VERSION, "device"),
               "Time that instances spent running batches."),
        Family("instances", "gauge", (*_VERSION, "device", "state"), "Instances, by state."),
        Family("model_state", "gauge", (*_VERSION, "state"), "1 for the state that the version is in."),
        Family("model_load_seconds", "gauge", _VERSION, "What loading, proving and warming up took."),
        Family("dropped_entries_total", "counter", (*_VERSION, "reason"),
               "Entries that were accepted and then dropped without running."),
        Family("build_info", "info", (), "Versions of Inferpool and its runtimes."),
    )
}  # fmt: skip
"""Everything exported, by name without the prefix."""

Sample = tuple[str, tuple[str, ...], float]
"""A gauge read at scrape time: the family's name, its label values, the number."""


class Metrics:
    """All values of a server, and their rendering."""

    def __init__(self, info: dict[str, str]) -> None:
        """`info` is what `build_info` says."""
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[str, ...]], Value] = {}
        self._distributions: dict[tuple[str, tuple[str, ...]], Distribution] = {}
        self._sources: list[Callable[[], Iterable[Sample]]] = []
        self._info = info
        self._registry = CollectorRegistry()
        self._registry.register(_Adapter(self))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def value(self, name: str, *labels: str) -> Value:
        """The counter of family `name` with these label values, made when first asked for."""
        self._check(name, labels)
        with self._lock:
            return self._values.setdefault((name, labels), Value())

    def distribution(self, name: str, *labels: str) -> Distribution:
        """The histogram of family `name` with these label values, made when first asked for."""
        self._check(name, labels)
        with self._lock:
            return self._distributions.setdefault((name, labels), Distribution(FAMILIES[name].bounds))

    def add_source(self, source: Callable[[], Iterable[Sample]]) -> None:
        """Ask `source` for gauges at each scrape."""
        self._sources.append(source)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it, else text."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """The families as `prometheus_client` wants them."""
        with self._lock:
            values = list(self._values.items())
            distributions = list(self._distributions.items())
        samples = [(name, labels, value.value) for (name, labels), value in values]
        for source in self._sources:
            samples.extend(source())
        by_family: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for name, labels, number in samples:
            by_family.setdefault(name, []).append((labels, number))
        for name, family in FAMILIES.items():
            if family.kind == "info":
                yield InfoMetricFamily("inferpool_build", family.help, value=self._info)
            elif family.kind == "histogram":
                histogram = HistogramMetricFamily(family.full_name, family.help, labels=family.labels)
                for (of, labels), distribution in distributions:
                    if of == name:
                        histogram.add_metric(labels, distribution.buckets(), distribution.sum)
                yield histogram
            else:
                make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
                metric = make(family.full_name.removesuffix("_total"), family.help, labels=family.labels)
                for labels, number in by_family.get(name, ()):
                    metric.add_metric(labels, number)
                yield metric

    @staticmethod
    def _check(name: str, labels: tuple[str, ...]) -> None:
        if len(labels) != len(FAMILIES[name].labels):
            raise ValueError(f"{name} has the labels {FAMILIES[name].labels}, not {labels}")


class _Adapter(Collector):
    """Lets `prometheus_client` collect from Metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect()
