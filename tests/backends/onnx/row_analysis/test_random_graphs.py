"""No random graph that is called independent answers a row otherwise in company than alone."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import onnx
import onnxruntime as ort
from hypothesis import HealthCheck, event, given, settings
from inferpool.backends.onnx.row_analysis.analysis import analyse
from inferpool.backends.row_verdict import Independence

from tests.backends.onnx.row_analysis.random_graphs import random_models, rows_are_independent

GRAPHS = int(os.environ.get("ROW_ANALYSIS_GRAPHS", "300"))
"""How many graphs are made; `scripts/test --full` makes more."""

seen: Counter[tuple[bool, str]] = Counter()


@settings(max_examples=GRAPHS, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_models())
def test_no_mixing_graph_is_called_independent(
    made: tuple[onnx.ModelProto, ort.InferenceSession, Any],
) -> None:
    model, session, x = made
    verdict = analyse(model)
    truth = rows_are_independent(session, x)
    seen[truth, verdict.independence.value] += 1
    event(f"{verdict.independence.value}, in truth {'independent' if truth else 'mixed'}")
    if verdict.independence is Independence.INDEPENDENT:
        assert truth, f"{verdict.reason}\n{onnx.printer.to_text(model)}"


def test_most_independent_graphs_are_called_so() -> None:
    """The analysis is of use: it runs after the test above, and counts what that has seen."""
    right, all_of_them = seen[True, "independent"], sum(count for (truth, _), count in seen.items() if truth)
    assert all_of_them > 0
    assert right / all_of_them > 0.6, seen
