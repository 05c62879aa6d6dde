"""How metrics are written: Prometheus' text format 0.0.4, and OpenMetrics 1.0.

What does not change of a series, its name and labels, is made once as a *stem*; a scrape only puts the
numbers behind it, so that many versions do not make a slow page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class Exemplar(NamedTuple):
    """One request that a bucket counted: its trace, what was measured, and when (Unix time in seconds)."""

    trace_id: str
    amount: float
    time: float


class HistogramStems(NamedTuple):
    """The stems of a histogram's series: one a bucket, `+Inf` last, and those of its count and sum."""

    buckets: tuple[str, ...]
    of_count: str
    of_sum: str


def stem(name: str, labels: Sequence[str], values: Sequence[str]) -> str:
    """A series up to its number: `name{label="value"} `."""
    if not labels:
        return f"{name} "
    pairs = ",".join(
        f'{label}="{value.translate(_ESCAPES)}"' for label, value in zip(labels, values, strict=True)
    )
    return f"{name}{{{pairs}}} "


def histogram_stems(
    name: str, labels: Sequence[str], values: Sequence[str], bounds: Sequence[float]
) -> HistogramStems:
    """The stems of a histogram with these upper bounds; OpenMetrics wants them written as floats."""
    named = [*map(str, map(float, bounds)), "+Inf"]
    buckets = tuple(stem(f"{name}_bucket", (*labels, "le"), (*values, bound)) for bound in named)
    return HistogramStems(buckets, stem(f"{name}_count", labels, values), stem(f"{name}_sum", labels, values))


def histogram_lines(
    stems: HistogramStems, counts: Sequence[int], total: float, exemplars: Mapping[int, Exemplar]
) -> str:
    """The series of a histogram: `counts` are those of each bucket, `exemplars` those of some."""
    cumulative = list(accumulate(counts))
    if exemplars:
        lines = [
            f"{text}{count}{_exemplar(exemplars.get(number))}\n"
            for number, (text, count) in enumerate(zip(stems.buckets, cumulative, strict=True))
        ]
    else:
        lines = [f"{text}{count}\n" for text, count in zip(stems.buckets, cumulative, strict=True)]
    lines.append(f"{stems.of_count}{cumulative[-1]}\n{stems.of_sum}{total}\n")
    return "".join(lines)


def header(name: str, kind: str, text: str, *, openmetrics: bool) -> str:
    """The comments above a family; the two formats differ in what they call a counter and an info."""
    if kind == "info":
        name, kind = (name.removesuffix("_info"), "info") if openmetrics else (name, "gauge")
    elif kind == "counter" and openmetrics:
        name = name.removesuffix("_total")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _exemplar(exemplar: Exemplar | None) -> str:
    if exemplar is None:
        return ""
    return f' # {{trace_id="{exemplar.trace_id}"}} {exemplar.amount} {exemplar.time:.3f}'
