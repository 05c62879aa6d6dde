"""Writes `shap_values.json`: what the package `shap` says of two models, for comparison.

It is not among the packages of the tests, because it needs numba and LLVM, 150 MB. To write the file again:

    uv run --with shap==0.51.0 --with onnxruntime python -m tests.explain.make_shap_values
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import shap  # type: ignore[import-not-found]

from tests.explain.models import DIGITS, SEVEN, curved, digit_score, seven

FILE = Path(__file__).with_name("shap_values.json")
PASSES = 40_000


def explain(model: Any, baseline: Any, row: Any, passes: Any) -> list[float]:
    """The values of KernelSHAP, without the selection of features that it makes by default."""
    np.random.seed(0)
    found = shap.KernelExplainer(model, baseline[None]).shap_values(row, nsamples=passes, l1_reg=False)
    values: list[float] = np.asarray(found).reshape(-1).tolist()
    return values


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(DIGITS)
    row = seven()
    values = {
        "curved": explain(curved, np.zeros(10), np.ones(10), 2**10),
        "digits": explain(
            lambda rows: digit_score(session, rows, SEVEN), np.zeros(row.size), row.reshape(-1), PASSES
        ),
    }
    FILE.write_text(json.dumps(values, indent=1) + "\n")
