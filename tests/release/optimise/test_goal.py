"""A goal holds if the whole interval of a difference is within what it allows."""

from __future__ import annotations

import math

import pytest
from inferpool.errors import ConfigError
from inferpool.release.evaluate.metrics import Estimate
from inferpool.release.optimise.goal import parse_goal


@pytest.mark.parametrize(
    ("text", "before", "difference", "holds"),
    [
        ("accuracy -0.5pp", 0.9, Estimate(-0.002, -0.005, 0.001), True),
        ("accuracy -0.5pp", 0.9, Estimate(-0.002, -0.0051, 0.001), False),
        ("accuracy -0pp", 0.9, Estimate(0, 0, 0), True),
        ("rmse +2%", 50, Estimate(0.5, 0.1, 1.0), True),
        ("rmse +2%", 50, Estimate(0.5, 0.1, 1.1), False),
        (" perplexity  + 0.3 ", 9, Estimate(-1, -2, 0.3), True),
        ("f1 -1%", 0.5, Estimate(0, -0.006, 0), False),
        ("auc -1pp", 0.5, Estimate(0, math.nan, math.nan), False),
    ],
)
def test_what_holds(text: str, before: float, difference: Estimate, holds: bool) -> None:
    assert parse_goal(text).holds(before, difference) is holds


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("accuracy", "expected a metric and a change"),
        ("beauty -1pp", "no metric beauty"),
        ("accuracy +1pp", "accuracy becomes worse by -1pp"),
        ("rmse -1%", r"rmse becomes worse by \+1%"),
    ],
)
def test_goals_that_are_none(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_goal(text)
