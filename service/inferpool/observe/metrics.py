"""All metrics, and their text for Prometheus.

Metrics may cost a request one microsecond. So the values are plain numbers, without locks and without
label look-ups. Each value has one writer at a time: the event loop writes the values of requests, the pool
writes those of batches under its lock. A writer looks a value up once per version and keeps it. A scrape
renders the values as text or OpenMetrics; the metrics of the process come from `prometheus_client`.

`FAMILIES` is the table of all exported metrics; a test compares the documented table with it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from inferpool.observe.prometheus_text import (
    Exemplar,
    HistogramStems,
    header,
    histogram_lines,
    histogram_stems,
    stem,
)

SECONDS_BUCKETS: Final = (
    0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.004, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06,
    0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Upper bounds for durations in seconds: steps of about 1.6, from 0.5 ms to 30 s."""

ROWS_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds for the rows of a batch."""

USUAL_STATUSES: Final = ("200", "422", "429", "500", "503", "504")
"""Statuses whose counters exist from the start: a rate misses the first request of a new series."""


class Value:
    """A number with one writer at a time, which any thread may read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        self.value += amount


class Distribution:
    """A histogram with one writer at a time, which any thread may read."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, amount: float) -> None:
        """Count `amount` in the first bucket whose upper bound is not below it."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.sum += amount

    def exemplify(self, exemplar: Exemplar) -> None:
        """Attach `exemplar`, whose amount was observed, to its bucket in place of the previous one."""
        self.exemplars[bisect_left(self.bounds, exemplar.amount)] = exemplar


@dataclass(frozen=True, slots=True)
class Family:
    """One exported metric: its name without the prefix, its kind, labels and help text."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """The exported name, with prefix."""
        return "inferpool_" + self.name


_VERSION: Final = ("model", "version")

FAMILIES: Final = {
    family.name: family
    for family in (
        Family("requests_total", "counter", (*_VERSION, "code"),
               "Predict requests answered, by HTTP status."),
        Family("request_duration_seconds", "histogram", _VERSION,
               "Time from a request's head to its response, errors included.", SECONDS_BUCKETS),
        Family("queue_duration_seconds", "histogram", _VERSION,
               "Time that requests waited in the queue.", SECONDS_BUCKETS),
        Family("compute_duration_seconds", "histogram", _VERSION,
               "Time that the batches of requests ran in the model.", SECONDS_BUCKETS),
        Family("batch_rows", "histogram", _VERSION, "Rows of each batch that ran.", ROWS_BUCKETS),
        Family("batches_total", "counter", (*_VERSION, "device", "reason"),
               "Batches that ran, by the reason why they were not larger."),
        Family("tokens_total", "counter", _VERSION,
               "Tokens that text models ran, padding included."),
        Family("padded_tokens_total", "counter", _VERSION,
               "Padding tokens that extended rows to the longest of their batch."),
        Family("padded_rows_total", "counter", _VERSION,
               "Padding rows that extended batches to a size that the GPU has run before."),
        Family("queue_rows", "gauge", _VERSION, "Rows that wait in the queue now."),
        Family("queue_oldest_age_seconds", "gauge", _VERSION,
               "Time that the oldest request in the queue has waited."),
        Family("queue_wait_seconds", "gauge", _VERSION,
               "Work that waits in the queue, in seconds by the measured rate."),
        Family("in_flight_requests", "gauge", (), "Predict requests that are read, run or answered now."),
        Family("instance_busy_seconds_total", "counter", (*_VERSION, "device"),
               "Time that instances ran batches."),
        Family("web_busy_seconds_total", "counter", (),
               "CPU time of the thread that reads and answers requests; one second per second is its limit."),
        Family("instances", "gauge", (*_VERSION, "device", "state"), "Instances, by state."),
        Family("model_state", "gauge", (*_VERSION, "state"),
               "1 for the current state of a version, 0 for the others."),
        Family("model_load_seconds", "gauge", _VERSION,
               "Time to load, check, measure and warm up a version."),
        Family("dropped_entries_total", "counter", (*_VERSION, "reason"),
               "Requests that were queued and then dropped without running."),
        Family("audits_total", "counter", _VERSION,
               "Requests that ran again alone, to compare their answers with those in a batch."),
        Family("batching_stopped_total", "counter", (*_VERSION, "reason"),
               "Times that batching was turned off while serving, by what differed from a run alone."),
        Family("cpu_nodes", "gauge", _VERSION,
               "Nodes of a GPU model that run on the CPU."),
        Family("gpu_utilization_ratio", "gauge", ("device",),
               "Share of the recent time in which the GPU was busy."),
        Family("gpu_memory_used_bytes", "gauge", ("device",),
               "GPU memory in use by all processes."),
        Family("gpu_memory_total_bytes", "gauge", ("device",), "GPU memory in total."),
        Family("gpu_temperature_celsius", "gauge", ("device",), "Temperature of the GPU core."),
        Family("gpu_power_watts", "gauge", ("device",), "Power that the GPU draws."),
        Family("gpu_energy_joules_total", "counter", ("device",),
               "Energy that the GPU has used since its driver was loaded."),
        Family("memory_limit_bytes", "gauge", (),
               "Memory that the server may take: the limit of its cgroup, or a setting."),
        Family("memory_held_bytes", "gauge", (),
               "Memory of the limit that is taken and that the kernel cannot take back."),
        Family("in_flight_bytes", "gauge", (), "Memory that requests have reserved now."),
        Family("in_flight_limit_bytes", "gauge", (), "Memory that requests may reserve together."),
        Family("memory_trims_total", "counter", (), "Times that freed memory was given back to the kernel."),
        Family("memory_trim_seconds_total", "counter", (), "Time that giving freed memory back took."),
        Family("memory_trimmed_bytes_total", "counter", (), "Freed memory that was given back."),
        Family("build_info", "info", (),
               "Versions of Inferpool and its runtimes, and whether the hot path is compiled."),
    )
}  # fmt: skip
"""All exported metrics, by name without the prefix."""

Sample = tuple[str, tuple[str, ...], float]
"""A gauge that a source reads at scrape time: the family's name, its label values, the number."""


class Metrics:
    """The metrics of a server."""

    def __init__(self, info: dict[str, str]) -> None:
        """Start without values; `info` has the labels of `build_info`."""
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], tuple[str, Value]]] = {}
        self._distributions: dict[str, dict[tuple[str, ...], tuple[HistogramStems, Distribution]]] = {}
        self._stems: dict[tuple[str, tuple[str, ...]], str] = {}
        self._sources: list[Callable[[], Iterable[Sample]]] = []
        self._info = stem("inferpool_build_info", tuple(info), tuple(info.values())) + "1\n"
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def value(self, name: str, *labels: str) -> Value:
        """The counter of family `name` with these label values, created at the first call."""
        family = self._family(name, labels)
        with self._lock:
            series = self._values.setdefault(name, {})
            if labels not in series:
                series[labels] = (stem(family.full_name, family.labels, labels), Value())
            return series[labels][1]

    def distribution(self, name: str, *labels: str) -> Distribution:
        """The histogram of family `name` with these label values, created at the first call."""
        family = self._family(name, labels)
        with self._lock:
            series = self._distributions.setdefault(name, {})
            if labels not in series:
                stems = histogram_stems(family.full_name, family.labels, labels, family.bounds)
                series[labels] = (stems, Distribution(family.bounds))
            return series[labels][1]

    def add_version(self, model: str, version: str) -> None:
        """Export the version's request counters and histograms with the value 0."""
        for status in USUAL_STATUSES:
            self.value("requests_total", model, version, status)
        for family in FAMILIES.values():
            if family.kind == "histogram":
                self.distribution(family.name, model, version)

    def add_source(self, source: Callable[[], Iterable[Sample]]) -> None:
        """Call `source` for its gauges at each scrape."""
        self._sources.append(source)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics if `accept` asks for it, else text."""
        encode, content_type = choose_encoder(accept)
        own = self._text(openmetrics=content_type.startswith("application/openmetrics-text"))
        # The encoder comes last, because it writes the mark that ends an OpenMetrics page.
        return own.encode() + encode(self._registry), content_type

    def _text(self, *, openmetrics: bool) -> str:
        with self._lock:
            values = {name: list(series.values()) for name, series in self._values.items()}
            distributions = {name: list(series.values()) for name, series in self._distributions.items()}
        gauges: dict[str, list[str]] = {}
        for source in self._sources:
            for name, labels, number in source():
                gauges.setdefault(name, []).append(f"{self._gauge_stem(name, labels)}{number}\n")
        parts: list[str] = []
        for name, family in FAMILIES.items():
            parts.append(header(family.full_name, family.kind, family.help, openmetrics=openmetrics))
            if family.kind == "info":
                parts.append(self._info)
            elif family.kind == "histogram":
                # The text format has no exemplars.
                parts += [
                    histogram_lines(
                        stems, list(each.counts), each.sum, dict(each.exemplars) if openmetrics else {}
                    )
                    for stems, each in distributions.get(name, ())
                ]
            else:
                parts += [f"{text}{value.value}\n" for text, value in values.get(name, ())]
                parts += gauges.get(name, ())
        return "".join(parts)

    def _gauge_stem(self, name: str, labels: tuple[str, ...]) -> str:
        known = self._stems.get((name, labels))
        if known is None:
            family = self._family(name, labels)
            known = self._stems[name, labels] = stem(family.full_name, family.labels, labels)
        return known

    @staticmethod
    def _family(name: str, labels: tuple[str, ...]) -> Family:
        family = FAMILIES[name]
        if len(labels) != len(family.labels):
            raise ValueError(f"{name} has the labels {family.labels}, not {labels}")
        return family
