"""Models whose features contribute known amounts."""

from __future__ import annotations

import json
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
from inferpool.tensors import Array

from tests.server import ROOT

DIGITS = ROOT / "models" / "digits" / "1" / "model.onnx"
SEVEN = 7


def curved(rows: Array) -> Array:
    """A number for each row of ten: features matter by themselves, in pairs, and all together."""
    weights = np.sin(np.arange(10) + 1.0)
    pairs = np.cos(np.outer(np.arange(10), np.arange(10)))
    together = np.einsum("ni,ij,nj->n", rows, pairs, rows)
    numbers: Array = np.tanh(rows @ weights) + 0.1 * together + rows[:, 0] * rows[:, 3] * rows[:, 7]
    return numbers


def seven() -> Array:
    """The first picture of a seven among the golden samples of digits, FP32 `[1, 8, 8]`."""
    sample = json.loads((DIGITS.parents[1] / "samples" / "held_out.json").read_text())
    [inputs], [scores] = sample["inputs"].values(), sample["outputs"].values()
    number = next(row for row, numbers in enumerate(scores) if int(np.argmax(numbers)) == SEVEN)
    return np.array(inputs[number], np.float32)


def digit_score(session: Any, rows: Array, digit: int) -> Array:
    """The probability of `digit` for pictures `[rows, 64]`."""
    name = session.get_inputs()[0].name
    [logits] = session.run(None, {name: rows.reshape(-1, 1, 8, 8).astype(np.float32)})
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: Array = (raised[:, digit] / raised.sum(axis=1)).astype(np.float64)
    return scores


def shapley_values(number: Any, features: int) -> Array:
    """The Shapley values of `number`, which takes masks BOOL `[n, features]`, by their definition."""
    values = np.zeros(features)
    for feature in range(features):
        others = [other for other in range(features) if other != feature]
        for size in range(features):
            weight = factorial(size) * factorial(features - size - 1) / factorial(features)
            sets = np.zeros((len(list(combinations(others, size))), features), np.bool_)
            for index, chosen in enumerate(combinations(others, size)):
                sets[index, list(chosen)] = True
            without = number(sets)
            sets[:, feature] = True
            values[feature] += weight * (number(sets) - without).sum()
    return values
