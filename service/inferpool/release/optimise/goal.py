"""How much worse a model's answers may become: `accuracy -0.5pp`, `rmse +2%`, `perplexity +0.3`."""

from __future__ import annotations

import math
import re
from typing import Final, NamedTuple

from inferpool.errors import ConfigError
from inferpool.release.evaluate.metrics import Estimate

_LARGER_IS_BETTER: Final = (
    *("accuracy", "top_5_accuracy", "f1", "auc", "r2", "mrr_at_10", "ndcg_at_10"),
    *(f"{share}_at_{depth}" for share in ("recall", "precision") for depth in (1, 5, 10)),
)
_SMALLER_IS_BETTER: Final = ("log_loss", "perplexity", "rmse", "mae")
_GOAL: Final = re.compile(r"\s*(\w+)\s*([+-])\s*(\d+(?:\.\d+)?)\s*(pp|%)?\s*")


class Goal(NamedTuple):
    """A metric and how much worse it may become.

    Attributes:
        metric: its name in an evaluation.
        allowed: the largest change for the worse, at least 0.
        relative: whether `allowed` is a share of the value before.
        text: the goal as it was given.
    """

    metric: str
    allowed: float
    relative: bool
    text: str

    def holds(self, before: float, difference: Estimate) -> bool:
        """Whether the whole 95 % interval of `difference`, new minus old, is within what is allowed."""
        worst = -difference.low if self.metric in _LARGER_IS_BETTER else difference.high
        allowed = self.allowed * abs(before) if self.relative else self.allowed
        return not math.isnan(worst) and worst <= allowed


def parse_goal(text: str) -> Goal:
    """Read a goal: a metric, the direction in which it becomes worse, and by how much at most.

    `pp` is a percentage point, `%` a share of the value before, and a number alone the metric's own unit.
    Raises ConfigError.
    """
    match = _GOAL.fullmatch(text)
    if match is None:
        raise ConfigError(f"--goal {text!r}: expected a metric and a change, such as 'accuracy -0.5pp'")
    metric, sign, number, unit = match.groups()
    if metric not in (*_LARGER_IS_BETTER, *_SMALLER_IS_BETTER):
        known = ", ".join((*_LARGER_IS_BETTER, *_SMALLER_IS_BETTER))
        raise ConfigError(f"--goal {text!r}: there is no metric {metric}; choose from {known}")
    worse = "-" if metric in _LARGER_IS_BETTER else "+"
    if sign != worse:
        raise ConfigError(f"--goal {text!r}: {metric} becomes worse by {worse}{number}{unit or ''}")
    allowed = float(number) / (100 if unit else 1)
    return Goal(metric, allowed, unit == "%", text)
