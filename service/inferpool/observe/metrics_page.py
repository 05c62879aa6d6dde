"""The page `/metrics`: all metrics of the server as text for Prometheus, or as OpenMetrics.

The metrics of the process come from `prometheus_client`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from inferpool.observe.exposition import choose_exposition
from inferpool.observe.families import FAMILIES, Family
from inferpool.observe.metrics import Labels, Metrics, Rests, rest_briefly
from inferpool.observe.prometheus_text import (
    Exemplar,
    HistogramStems,
    header,
    histogram_lines,
    histogram_stems,
    stem,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class MetricsPage:
    """Renders the metrics of a server, and keeps the parts of lines that stay the same."""

    def __init__(self, metrics: Metrics, rest: Callable[[], None] = rest_briefly) -> None:
        """Show `metrics`; `rest` lets other threads run, and is called after each piece of a page."""
        self._metrics = metrics
        self._rest = rest
        self._stems: dict[tuple[str, Labels], str] = {}
        self._histogram_stems: dict[tuple[str, Labels], HistogramStems] = {}
        self._registry: CollectorRegistry | None = None

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics if `accept` asks for it, else text."""
        # Imported late: only a process that answers requests shows metrics.
        from prometheus_client.exposition import generate_latest as as_text
        from prometheus_client.openmetrics.exposition import generate_latest as as_openmetrics

        openmetrics, content_type = choose_exposition(accept)
        own = self._text(openmetrics=openmetrics).encode()
        # The encoder comes last, because it writes the mark that ends an OpenMetrics page.
        registry = self._process_registry()
        encoded = as_openmetrics(registry) if openmetrics else as_text(registry)  # type: ignore[no-untyped-call]
        return own + encoded, content_type

    def _process_registry(self) -> CollectorRegistry:
        """The metrics of the process."""
        from inferpool.observe.process_metrics import process_registry

        if self._registry is None:
            metrics = self._metrics
            self._registry = process_registry(metrics.processes if metrics.is_shared else None)
        return self._registry

    def _text(self, *, openmetrics: bool) -> str:
        exemplars: dict[tuple[str, Labels], dict[int, Exemplar]] = {}
        if openmetrics:  # the text format has none
            # Before the counts, so that what an exemplar shows is counted.
            exemplars = self._metrics.exemplars()
        rests = Rests(self._rest)
        numbers_of, histograms = self._metrics.figures(rests)
        info = self._metrics.info
        parts: list[str] = []
        for name, family in FAMILIES.items():
            parts.append(header(family.full_name, family.kind, family.help, openmetrics=openmetrics))
            if family.kind == "info":
                parts.append(stem(family.full_name, tuple(info), tuple(info.values())) + "1\n")
            elif family.kind == "histogram":
                for labels, numbers in histograms[name].items():
                    counts = [int(number) for number in numbers[:-1]]
                    parts.append(
                        histogram_lines(
                            self._stems_of(family, labels), counts, numbers[-1],
                            exemplars.get((name, labels), {}),
                        )
                    )  # fmt: skip
                    rests.after(len(numbers))
            else:
                for labels, number in numbers_of[name].items():
                    parts.append(f"{self._stem_of(family, labels)}{number}\n")
                    rests.after(1)
        return "".join(parts)

    def _stem_of(self, family: Family, labels: Labels) -> str:
        known = self._stems.get((family.name, labels))
        if known is None:
            known = self._stems[family.name, labels] = stem(family.full_name, family.labels, labels)
        return known

    def _stems_of(self, family: Family, labels: Labels) -> HistogramStems:
        known = self._histogram_stems.get((family.name, labels))
        if known is None:
            known = histogram_stems(family.full_name, family.labels, labels, family.bounds)
            self._histogram_stems[family.name, labels] = known
        return known
