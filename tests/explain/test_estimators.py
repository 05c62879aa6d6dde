"""Estimates of contributions: against the definition of Shapley values, and against the package `shap`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.explain.coalitions import all_coalitions, choose, pairs_in
from inferpool.explain.estimators import (
    KERNEL,
    METHODS,
    OCCLUSION,
    PERMUTATION,
    Estimate,
    Evaluate,
    TooFewPasses,
    estimate,
    least_coalitions,
)
from inferpool.tensors import Array

from tests.explain.models import DIGITS, SEVEN, curved, digit_score, seven, shapley_values

SHAP = json.loads(Path(__file__).with_name("shap_values.json").read_text())
SHAPLEY = (KERNEL, PERMUTATION)
SEEDS = st.integers(0, 2**32 - 1)


def game(features: int, seed: int) -> Evaluate:
    """A number for each coalition, without any structure."""
    table = np.random.default_rng(seed).standard_normal(1 << features)
    powers = 1 << np.arange(features)

    def number(masks: Array) -> Array:
        values: Array = table[masks @ powers]
        return values

    return number


def explained(method: str, number: Evaluate, features: int, most: int, seed: int = 0) -> Estimate:
    base, value = number(np.array([[False] * features, [True] * features]))
    return estimate(method, float(base), float(value), features, most, seed, number)


@given(features=st.integers(1, 7), seed=SEEDS, method=st.sampled_from(SHAPLEY))
def test_all_coalitions_give_the_exact_values(features: int, seed: int, method: str) -> None:
    number = game(features, seed)
    found = explained(method, number, features, all_coalitions(features))
    assert (found.exact, found.complete) == (True, True)
    np.testing.assert_allclose(found.contributions, shapley_values(number, features), atol=1e-9)
    assert not found.standard_errors.any()


@given(
    features=st.integers(2, 40),
    seed=SEEDS,
    method=st.sampled_from(SHAPLEY),
    extra=st.integers(0, 200),
    ran=st.floats(0, 1),
)
def test_whatever_was_run_adds_up_and_is_no_more_than_allowed(
    features: int, seed: int, method: str, extra: int, ran: float
) -> None:
    weights = np.random.default_rng(seed).standard_normal(features)
    most = least_coalitions(method, features) + extra
    asked = 0

    def number(masks: Array) -> Array:
        nonlocal asked
        asked += len(masks)
        values: Array = np.tanh(masks @ weights)
        return values[: round(ran * len(masks))]

    value = float(np.tanh(weights.sum()))
    try:
        found = estimate(method, 0.0, value, features, most, seed, number)
    except TooFewPasses:
        assert ran < 1
    else:
        assert found.contributions.sum() == pytest.approx(value, abs=1e-6)
        assert np.isfinite(found.contributions).all()
        assert found.complete or ran < 1 or method == PERMUTATION
    assert asked <= most


@pytest.mark.parametrize("method", SHAPLEY)
def test_standard_errors_are_those_of_the_estimates(method: str) -> None:
    number, features = game(9, 3), 9
    exact = shapley_values(number, features)
    runs = [explained(method, number, features, 200, seed) for seed in range(100)]
    scores = np.array([(run.contributions - exact) / run.standard_errors for run in runs])
    assert 0.8 < scores.std() < 1.25
    assert abs(scores.mean()) < 0.2


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_estimate(method: str) -> None:
    number = game(10, 1)
    one, two = (explained(method, number, 10, 300, seed=5) for _ in range(2))
    assert one.contributions.tobytes() == two.contributions.tobytes()
    assert one.standard_errors.tobytes() == two.standard_errors.tobytes()
    other = explained(method, number, 10, 300, seed=6)
    assert (one.contributions.tobytes() != other.contributions.tobytes()) == (method != OCCLUSION)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_passes_are_an_error_that_says_how_many_are_needed(method: str) -> None:
    number = game(12, 1)
    needed = least_coalitions(method, 12)
    explained(method, number, 12, needed)
    with pytest.raises(TooFewPasses) as caught:
        explained(method, number, 12, needed - 1)
    assert caught.value.needed == needed


def test_occlusion_is_the_fall_without_each_feature() -> None:
    found = explained(OCCLUSION, curved_coalition, 10, 10)
    rows = np.ones((11, 10)) - np.eye(11, 10)
    numbers = curved(rows)
    np.testing.assert_allclose(found.contributions, numbers[-1] - numbers[:-1])


@given(features=st.integers(2, 30), most=st.integers(0, 400), seed=SEEDS)
def test_coalitions_are_pairs_and_none_is_listed_twice(features: int, most: int, seed: int) -> None:
    most += 2 * features
    masks, strata = choose(features, most, np.random.default_rng(seed))
    assert len(masks) <= most
    assert (masks[0::2] != masks[1::2]).all()
    sizes = masks.sum(axis=1)
    assert (np.minimum(sizes, features - sizes) == strata).all()
    singles = masks[strata == 1]
    assert len({mask.tobytes() for mask in singles}) == len(singles) == 2 * pairs_in(features, 1)
    if most >= all_coalitions(features):
        assert len({mask.tobytes() for mask in masks}) == all_coalitions(features)


def test_the_values_of_shap_are_found_exactly() -> None:
    found = explained(KERNEL, curved_coalition, 10, all_coalitions(10))
    np.testing.assert_allclose(found.contributions, SHAP["curved"], atol=1e-9)


@pytest.mark.parametrize("method", SHAPLEY)
def test_the_values_of_shap_are_found_within_the_errors_of_sampling(method: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session, picture = onnxruntime.InferenceSession(DIGITS), seven().reshape(-1)

    def number(masks: Array) -> Array:
        return digit_score(session, np.where(masks, picture, np.float32(0)), SEVEN)

    found = explained(method, number, picture.size, 4000)
    scores = (found.contributions - SHAP["digits"]) / np.maximum(found.standard_errors, 1e-6)
    assert np.abs(scores).max() < 5
    assert scores[picture > 0].std() < 1.5


def curved_coalition(masks: Array) -> Array:
    """`curved` for rows of ones, with zeros as baseline."""
    return curved(masks.astype(np.float64))
