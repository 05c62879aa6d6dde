"""Metrics are those of scikit-learn, and their intervals hold what they promise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import InvalidInput
from inferpool.release.evaluate.metrics import (
    ClassAnswers,
    Metric,
    NumberAnswers,
    calibration,
    calibration_error,
    class_indices,
    class_metrics,
    confusion,
    estimate,
    estimate_differences,
    number_metrics,
    wilson,
)

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def reference() -> Any:
    """The metrics of scikit-learn, which take seconds to import."""
    from sklearn import metrics

    return metrics


def some_classes(rows: int, *, seed: int = 0, names: tuple[str, ...] = NAMES) -> ClassAnswers:
    """Answers that are right more often than not."""
    source = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(len(names)), source.integers(len(names), size=rows - len(names))])
    logits = source.normal(size=(rows, len(names)))
    logits[np.arange(rows), truth] += 1.5
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return ClassAnswers(names, truth, scores)


def values(metrics: Mapping[str, Metric], rows: int) -> dict[str, float]:
    """The metrics without their intervals: those of F1 and of the areas take seconds."""
    return {name: metric(np.ones(rows)) for name, metric in metrics.items()}


def test_a_classifier_has_the_metrics_of_scikit_learn(reference: Any) -> None:
    answers = some_classes(300)
    best = answers.scores.argmax(axis=1)
    found = values(class_metrics(answers), 300)
    labels = range(len(NAMES))
    assert found == {
        "accuracy": pytest.approx(reference.accuracy_score(answers.truth, best)),
        "top_5_accuracy": pytest.approx(
            reference.top_k_accuracy_score(answers.truth, answers.scores, k=5, labels=labels)
        ),
        "f1": pytest.approx(reference.f1_score(answers.truth, best, average="macro")),
        "auc": pytest.approx(reference.roc_auc_score(answers.truth, answers.scores, multi_class="ovr")),
        "log_loss": pytest.approx(reference.log_loss(answers.truth, answers.scores, labels=labels)),
    }
    assert confusion(answers).tolist() == reference.confusion_matrix(answers.truth, best).tolist()


def test_two_classes_have_one_area(reference: Any) -> None:
    answers = some_classes(100, names=("no", "yes"))
    found = values(class_metrics(answers), 100)
    assert found["auc"] == pytest.approx(reference.roc_auc_score(answers.truth, answers.scores[:, 1]))
    assert "top_5_accuracy" not in found


def test_a_language_model_has_perplexity_and_scores_that_are_none_have_no_log_loss() -> None:
    answers = some_classes(50)
    found = estimate(class_metrics(answers, perplexity=True), 50)
    assert found["perplexity"].value == pytest.approx(math.exp(found["log_loss"].value))
    assert "f1" not in found
    raw = ClassAnswers(NAMES, answers.truth, np.log(answers.scores))
    assert "log_loss" not in class_metrics(raw)


def test_a_regression_has_the_metrics_of_scikit_learn(reference: Any) -> None:
    source = np.random.default_rng(1)
    truth = source.normal(size=80)
    answers = NumberAnswers(truth, truth + source.normal(scale=0.3, size=80) + 0.1)
    found = {name: each.value for name, each in estimate(number_metrics(answers), 80).items()}
    assert found == {
        "rmse": pytest.approx(reference.root_mean_squared_error(*answers)),
        "mae": pytest.approx(reference.mean_absolute_error(*answers)),
        "mean_error": pytest.approx(np.mean(answers.predicted - truth)),
        "r2": pytest.approx(reference.r2_score(*answers)),
    }
    assert "r2" not in number_metrics(NumberAnswers(np.ones(3), np.arange(3.0)))


@given(st.integers(1, 500), st.data())
def test_the_interval_of_a_share_holds_it_and_is_never_empty(rows: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, rows)) / rows
    low, high = wilson(share, rows)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert high - low > 0


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """The mean absolute error of a normal distribution is √(2/π): most of 60 intervals have it inside."""
    source = np.random.default_rng(2)
    truth = math.sqrt(2 / math.pi)
    inside = 0
    for _ in range(60):
        answers = NumberAnswers(np.zeros(100), source.normal(size=100))
        low, high = estimate({"mae": number_metrics(answers)["mae"]}, 100)["mae"][1:]
        inside += low <= truth <= high
    assert 50 <= inside < 60 + 1
    assert estimate(number_metrics(answers), 100) == estimate(number_metrics(answers), 100)


def test_a_difference_on_the_same_rows_is_narrower_than_two_intervals() -> None:
    good, bad = some_classes(400), some_classes(400)
    bad.scores[:40] = np.roll(bad.scores[:40], 1, axis=1)
    ones, others = ({"accuracy": class_metrics(each)["accuracy"]} for each in (good, bad))
    found = estimate_differences(ones, others, 400)["accuracy"]
    assert found.value == pytest.approx(
        estimate(ones, 400)["accuracy"].value - estimate(others, 400)["accuracy"].value
    )
    assert 0 < found.low < found.value < found.high
    low, high = estimate(ones, 400)["accuracy"][1:]
    assert found.high - found.low < high - low


def test_calibration_tells_scores_that_promise_too_much() -> None:
    scores = np.tile([0.95, 0.05], (100, 1))
    answers = ClassAnswers(("a", "b"), np.array([0] * 60 + [1] * 40), scores)
    (only,) = calibration(answers)
    assert (only.rows, only.right) == (100, 0.6)
    assert calibration_error([only]) == pytest.approx(0.35)


def test_targets_are_names_or_numbers_of_classes() -> None:
    assert class_indices(["bee", "ant", 2, 3.0, "4"], NAMES).tolist() == [1, 0, 2, 3, 4]
    assert class_indices([7, "8"], ("8", "7")).tolist() == [1, 0]
    with pytest.raises(InvalidInput, match="row 1: the target 'owl' is no class"):
        class_indices(["ant", "owl"], NAMES)
