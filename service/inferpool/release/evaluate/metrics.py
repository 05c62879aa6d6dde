"""Metrics of answers whose truth is known, with 95 % confidence intervals.

Intervals of shares are Wilson's (E. B. Wilson, JASA 22, 1927), which stay right near 0 and 1. All others are
percentiles of a bootstrap over rows (B. Efron, Ann. Stat. 7, 1979): a resample is a weight for each row, how
often the row was drawn. Two models are compared on the same resamples, because the same rows are easy or hard
for both. F1 and the area under the ROC curve are scikit-learn's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.tensors import Array

RESAMPLES: Final = 200
SEED: Final = 0
CALIBRATION_BINS: Final = 10
RANKS: Final = 10
"""How many documents of a search count."""
_DEPTHS: Final = (1, 5, 10)
_SHARES: Final = ("accuracy", "top_5_accuracy")
_MOST_AUC_CLASSES: Final = 50
"""With more classes there is no area under the ROC curve: it takes a sort for each class and resample."""
_Z: Final = 1.959963984540054
"""Of a normal distribution, 95 % lie within so many standard deviations."""
_LEAST_PROBABILITY: Final = 1e-15

Metric: TypeAlias = Callable[[Array], float]
"""The value of a metric if each row counts as often as its weight says; weights are FP64, [rows]."""


class Estimate(NamedTuple):
    """The value of a metric, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class ClassAnswers(NamedTuple):
    """What a classifier answered.

    Attributes:
        names: the names of the classes.
        truth: the index of each row's true class, INT64, [rows].
        scores: a score for each row and class, FP64, [rows, classes].
    """

    names: Sequence[str]
    truth: Array
    scores: Array


class NumberAnswers(NamedTuple):
    """What a regression answered: the true and the predicted number of each row, FP64, [rows]."""

    truth: Array
    predicted: Array


class RankedAnswers(NamedTuple):
    """Which documents a model of embeddings found for queries.

    Attributes:
        grades: how relevant the document at each rank is, 0 if it is not, FP64, [queries, `RANKS`].
        relevant: how many documents are relevant to each query, INT64, [queries].
        ideal: the discounted gain of the best order, FP64, [queries].
    """

    grades: Array
    relevant: Array
    ideal: Array


Answers: TypeAlias = ClassAnswers | NumberAnswers | RankedAnswers


class CalibrationBin(NamedTuple):
    """Rows whose best score lies in one range: how many, that score's mean, and the share that is right."""

    rows: int
    score: float
    right: float


def class_metrics(answers: ClassAnswers, *, perplexity: bool = False) -> dict[str, Metric]:
    """Return the metrics of a classifier; scores that are no probabilities have no log loss or perplexity."""
    from sklearn.metrics import f1_score

    truth, scores = answers.truth, answers.scores
    best = scores.argmax(axis=1)
    found: dict[str, Metric] = {"accuracy": _mean(best == truth)}
    if scores.shape[1] > 5:
        # Of equal scores those before the true class count as better, as they do in a sorted list.
        own = scores[np.arange(len(truth)), truth][:, None]
        earlier = np.arange(scores.shape[1]) < truth[:, None]
        better = (scores > own).sum(axis=1) + ((scores == own) & earlier).sum(axis=1)
        found["top_5_accuracy"] = _mean(better < 5)
    if not perplexity:
        found["f1"] = lambda weights: float(
            f1_score(truth, best, average="macro", sample_weight=weights, zero_division=0)
        )
        present = np.unique(truth)
        if 1 < scores.shape[1] <= _MOST_AUC_CLASSES and len(present) == scores.shape[1]:
            found["auc"] = lambda weights: _auc(truth, scores, weights)
    if are_probabilities(scores):
        losses = -np.log(np.maximum(scores[np.arange(len(truth)), truth], _LEAST_PROBABILITY))
        mean_loss = _mean(losses)
        found["log_loss"] = mean_loss
        if perplexity:
            found["perplexity"] = lambda weights: math.exp(mean_loss(weights))
    return found


def are_probabilities(scores: Array) -> bool:
    """Whether every row of `scores` is a distribution, but for rounding."""
    return bool((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-3))


def number_metrics(answers: NumberAnswers) -> dict[str, Metric]:
    """Return the metrics of a regression; there is no R² if all true numbers are equal."""
    truth, errors = answers.truth, answers.predicted - answers.truth
    mean_square = _mean(errors**2)
    found: dict[str, Metric] = {
        "rmse": lambda weights: math.sqrt(mean_square(weights)),
        "mae": _mean(np.abs(errors)),
        "mean_error": _mean(errors),
    }
    if len(np.unique(truth)) > 1:

        def r_squared(weights: Array) -> float:
            mean = np.average(truth, weights=weights)
            spread = np.average((truth - mean) ** 2, weights=weights)
            return 1 - mean_square(weights) / spread if spread else math.nan

        found["r2"] = r_squared
    return found


def ranked_metrics(answers: RankedAnswers) -> dict[str, Metric]:
    """Return the metrics of a search: means over the queries.

    The gain of a document is its grade, divided by the logarithm of its rank plus one, to the base two
    (K. Järvelin and J. Kekäläinen, ACM TOIS 20, 2002).
    """
    hits = answers.grades > 0
    found: dict[str, Metric] = {}
    for depth in _DEPTHS:
        found[f"recall_at_{depth}"] = _mean(hits[:, :depth].sum(axis=1) / answers.relevant)
    for depth in _DEPTHS:
        found[f"precision_at_{depth}"] = _mean(hits[:, :depth].sum(axis=1) / depth)
    first = hits.argmax(axis=1)
    found["mrr_at_10"] = _mean(np.where(hits.any(axis=1), 1 / (1 + first), 0))
    found["ndcg_at_10"] = _mean(discounted_gain(answers.grades) / answers.ideal)
    return found


def discounted_gain(grades: Array) -> Array:
    """Return the discounted gain of grades in their order, [queries, ranks] to [queries]."""
    gains: Array = grades @ (1 / np.log2(np.arange(grades.shape[1]) + 2))
    return gains


def estimate(metrics: Mapping[str, Metric], rows: int) -> dict[str, Estimate]:
    """Return each metric with its interval; the same rows give the same numbers."""
    drawn = _drawn({name: metric for name, metric in metrics.items() if name not in _SHARES}, rows)
    found = {}
    for name, metric in metrics.items():
        value = metric(np.ones(rows))
        found[name] = Estimate(value, *(wilson(value, rows) if name in _SHARES else _interval(drawn[name])))
    return found


def estimate_differences(
    metrics: Mapping[str, Metric], others: Mapping[str, Metric], rows: int
) -> dict[str, Estimate]:
    """Return how much larger each of `metrics` is than the one of its name in `others`, on the same rows."""

    def differ(one: Metric, other: Metric) -> Metric:
        return lambda weights: one(weights) - other(weights)

    shared = {name: differ(metric, others[name]) for name, metric in metrics.items() if name in others}
    drawn = _drawn(shared, rows)
    return {name: Estimate(metric(np.ones(rows)), *_interval(drawn[name])) for name, metric in shared.items()}


def wilson(share: float, rows: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a share that was seen among so many rows."""
    middle = share + _Z**2 / (2 * rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2))
    scale = 1 + _Z**2 / rows
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def confusion(answers: ClassAnswers) -> Array:
    """Return how many rows of each true class (rows) got each class (columns), INT64, [classes, classes]."""
    count = len(answers.names)
    cells = answers.truth * count + answers.scores.argmax(axis=1)
    return np.bincount(cells, minlength=count * count).reshape(count, count)


def calibration(answers: ClassAnswers) -> list[CalibrationBin]:
    """Return the rows by their best score, in bins of the same width from 0 to 1; empty ones are left out."""
    best = answers.scores.max(axis=1)
    right = answers.scores.argmax(axis=1) == answers.truth
    numbers = np.minimum((best * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return [
        CalibrationBin(int(inside.sum()), float(best[inside].mean()), float(right[inside].mean()))
        for inside in (numbers == number for number in range(CALIBRATION_BINS))
        if inside.any()
    ]


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error: how far scores and shares are apart, by rows."""
    rows = sum(each.rows for each in bins)
    return sum(each.rows * abs(each.score - each.right) for each in bins) / rows


def class_indices(targets: Sequence[Any], names: Sequence[str]) -> Array:
    """Return the index of each target among `names`; whole numbers are indices unless a class has that name.

    Raises InvalidInput if a target is no class.
    """
    by_name = {name: index for index, name in enumerate(names)}
    found = np.empty(len(targets), np.int64)
    for row, target in enumerate(targets):
        text = str(int(target)) if isinstance(target, float) and target.is_integer() else str(target)
        index = by_name.get(text)
        if index is None and text.isdecimal() and int(text) < len(names):
            index = int(text)
        if index is None:
            shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise InvalidInput(f"row {row}: the target {text!r} is no class of the model; it has {shown}")
        found[row] = index
    return found


def _mean(values: Array) -> Metric:
    numbers = values.astype(float)
    return lambda weights: float(weights @ numbers / weights.sum())


def _auc(truth: Array, scores: Array, weights: Array) -> float:
    """Return the mean area of each class beside all others; NaN if a resample lacks a class."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(truth[weights > 0])) < scores.shape[1]:
        return math.nan
    if scores.shape[1] == 2:
        return float(roc_auc_score(truth, scores[:, 1], sample_weight=weights))
    areas = [
        roc_auc_score(truth == number, scores[:, number], sample_weight=weights)
        for number in range(scores.shape[1])
    ]
    return float(np.mean(areas))


def _drawn(metrics: Mapping[str, Metric], rows: int) -> dict[str, list[float]]:
    """Return the value of each metric in each resample; one resample is in memory at a time."""
    source = np.random.default_rng(SEED)
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(RESAMPLES):
        weights = np.bincount(source.integers(rows, size=rows), minlength=rows).astype(float)
        for name, metric in metrics.items():
            values[name].append(metric(weights))
    return values


def _interval(values: Sequence[float]) -> tuple[float, float]:
    known = np.asarray(values)[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)
