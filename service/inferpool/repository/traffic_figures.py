"""What the server has counted of canaries and shadows, in all of its processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from inferpool.observe.families import SHADOW, SHADOW_OUTPUT, TRIAL
from inferpool.observe.metrics import Metrics, Sample
from inferpool.repository.catalog import Catalog
from inferpool.repository.rollout_policy import TrialCounts

MOST_OUTPUTS: Final = 4
"""Outputs of a shadow that have gauges of their own."""


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How the numbers of an output differ between copies and the answers that were sent.

    Attributes:
        largest: the largest difference of two numbers; of other values, 1 if two differ.
        mean: the mean of all differences.
        numbers: how many were compared.
        non_finite: numbers of which one only is finite, or that are different infinities; they are not among
            `numbers`.
    """

    largest: float = 0.0
    mean: float = 0.0
    numbers: int = 0
    non_finite: int = 0


@dataclass(frozen=True, slots=True)
class ShadowFigures:
    """What copies have shown.

    Attributes:
        compared: copies whose answers were compared.
        failed: copies that the shadow answered with an error.
        dropped: copies that were not run, or not in time, because the server was busy.
        unlike: compared copies with an output of another shape, or without an output.
        label_rows: rows with labels.
        changed_rows: those of them whose best label has changed.
        sent_s: seconds of queue and compute of the answers that were sent.
        copy_s: likewise, of the copies.
        slower: pairs whose copy took longer.
        outputs: the differences of each output.
    """

    compared: int = 0
    failed: int = 0
    dropped: int = 0
    unlike: int = 0
    label_rows: int = 0
    changed_rows: int = 0
    sent_s: float = 0.0
    copy_s: float = 0.0
    slower: int = 0
    outputs: Mapping[str, OutputDifference] = field(default_factory=dict)


def trial_counts(metrics: Metrics, model: str, version: int, number: int) -> TrialCounts:
    """What all processes have counted of a version in the trial of this number."""
    cells = metrics.hidden_series(TRIAL, model, str(version)).get((model, str(version)), [])
    own = [each for each in cells if each[0] == number]
    if not own:
        return TrialCounts()
    _, failures, *by_time = (int(sum(column)) for column in zip(*own, strict=True))
    return TrialCounts(failures, tuple(by_time))


def shadow_figures(metrics: Metrics, model: str, version: int, number: int) -> ShadowFigures:
    """What all processes have found of a shadow in the trial of this number."""
    name = str(version)
    cells = metrics.hidden_series(SHADOW, model, name).get((model, name), [])
    own = [each[1:] for each in cells if each[0] == number]
    if not own:
        return ShadowFigures()
    sums = [sum(column) for column in zip(*own, strict=True)]
    outputs = {}
    for labels, each in metrics.hidden_series(SHADOW_OUTPUT, model, name).items():
        found = [numbers[1:] for numbers in each if numbers[0] == number]
        if found:
            largest, total, count, non_finite = zip(*found, strict=True)
            numbers = int(sum(count))
            outputs[labels[2]] = OutputDifference(
                max(largest), sum(total) / numbers if numbers else 0.0, numbers, int(sum(non_finite))
            )
    compared, failed, dropped, unlike, label_rows, changed_rows = map(int, sums[:6])
    return ShadowFigures(
        compared, failed, dropped, unlike, label_rows, changed_rows, sums[6], sums[7], int(sums[8]), outputs
    )


def traffic_readings(catalog: Catalog, metrics: Metrics) -> Iterable[Sample]:
    """The gauges of all canaries and shadows, at this moment."""
    for model in catalog.models().values():
        traffic = model.traffic
        if traffic is None:
            continue
        canary = traffic.running
        if canary is not None:
            yield "canary_share", (model.name, str(canary.version)), canary.share
        if traffic.shadow is not None:
            labels = (model.name, str(traffic.shadow.version))
            figures = shadow_figures(metrics, model.name, traffic.shadow.version, traffic.number)
            if figures.label_rows:
                share = figures.changed_rows / figures.label_rows
                yield "shadow_changed_labels_ratio", labels, share
            for name, difference in few_differences(figures.outputs).items():
                yield "shadow_difference_largest", (*labels, name), difference.largest
                yield "shadow_difference_mean", (*labels, name), difference.mean


def few_differences(outputs: Mapping[str, OutputDifference]) -> dict[str, OutputDifference]:
    """The differences of the first `MOST_OUTPUTS` outputs by name, and under "" those of all others together.

    Each output has series for each version, and a model may have any number of outputs.
    """
    names = sorted(outputs)
    found = {name: outputs[name] for name in names[:MOST_OUTPUTS]}
    others = [outputs[name] for name in names[MOST_OUTPUTS:]]
    if others:
        numbers = sum(each.numbers for each in others)
        total = sum(each.mean * each.numbers for each in others)
        found[""] = OutputDifference(
            max(each.largest for each in others),
            total / numbers if numbers else 0.0,
            numbers,
            sum(each.non_finite for each in others),
        )
    return found
