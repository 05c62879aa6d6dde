"""Writes metrics in Prometheus' text format 0.0.4 and in OpenMetrics 1.0.

The constant front of a series, its name and labels, is made once and called its *stem*. A scrape only
appends the numbers, so that the page stays fast with many versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class Exemplar(NamedTuple):
    """One request that a bucket counted: its trace id, the measured amount, and the Unix time in seconds."""

    trace_id: str
    amount: float
    time: float


class HistogramStems(NamedTuple):
    """The stems of a histogram's series: one per bucket, `+Inf` last, and those of its count and sum."""

    buckets: tuple[str, ...]
    count_stem: str
    sum_stem: str


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
    """The stems of a histogram with these upper bounds, which OpenMetrics requires as floats."""
    named = [*map(str, map(float, bounds)), "+Inf"]
    buckets = tuple(stem(f"{name}_bucket", (*labels, "le"), (*values, bound)) for bound in named)
    return HistogramStems(buckets, stem(f"{name}_count", labels, values), stem(f"{name}_sum", labels, values))


def histogram_lines(
    stems: HistogramStems, counts: Sequence[int], total: float, exemplars: Mapping[int, Exemplar]
) -> str:
    """The lines of a histogram; `counts` has one number per bucket, `exemplars` are by bucket index."""
    cumulative = list(accumulate(counts))
    if exemplars:
        lines = [
            f"{text}{count}{_exemplar(exemplars.get(index))}\n"
            for index, (text, count) in enumerate(zip(stems.buckets, cumulative, strict=True))
        ]
    else:
        lines = [f"{text}{count}\n" for text, count in zip(stems.buckets, cumulative, strict=True)]
    lines.append(f"{stems.count_stem}{cumulative[-1]}\n{stems.sum_stem}{total}\n")
    return "".join(lines)


def header(name: str, kind: str, text: str, *, openmetrics: bool) -> str:
    """The comments above a family; the two formats name counters and infos differently."""
    if kind == "info":
        name, kind = (name.removesuffix("_info"), "info") if openmetrics else (name, "gauge")
    elif kind == "counter" and openmetrics:
        name = name.removesuffix("_total")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _exemplar(exemplar: Exemplar | None) -> str:
    if exemplar is None:
        return ""
    return f' # {{trace_id="{exemplar.trace_id}"}} {exemplar.amount} {exemplar.time:.3f}'
