"""No random TorchScript graph that is called independent answers a row otherwise in company than alone."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from inferpool.backends.row_analysis.dims import ONE, Dim
from inferpool.backends.row_analysis.values import rowed
from inferpool.backends.row_verdict import Independence
from inferpool.backends.torch.row_analysis.script import analyse_graph

from tests.backends.torch.networks import quiet
from tests.backends.torch.row_analysis.random_programs import Network, random_networks, rows_are_independent
from tests.record import needs_to_run

SCRIPTS = int(os.environ.get("ROW_ANALYSIS_SCRIPTS", "150"))
"""How many networks are traced."""


@pytest.fixture(scope="module", autouse=True)
def only_after_a_change() -> None:
    needs_to_run("torch")


seen: Counter[tuple[bool, str]] = Counter()


@settings(max_examples=SCRIPTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_networks())
def test_no_mixing_script_is_called_independent(made: tuple[Network, torch.Tensor]) -> None:
    network, x = made
    try:
        with quiet():
            script = torch.jit.freeze(torch.jit.trace(network.eval(), x, check_trace=False))
    except Exception:  # noqa: BLE001 - what cannot be traced is not served
        event("not traced")
        return
    verdict = analyse_graph(script.inlined_graph, [rowed((ONE, *map(Dim, x.shape[1:])), 0)])
    truth = rows_are_independent(script, x)
    seen[truth, verdict.independence.value] += 1
    event(f"{verdict.independence.value}, in truth {'independent' if truth else 'mixed'}")
    if verdict.independence is Independence.INDEPENDENT:
        names = [name for name, _ in network.chosen]
        assert truth, f"{verdict.reason}\n{names}\n{script.inlined_graph}"


def test_most_independent_scripts_are_called_so() -> None:
    """The analysis is of use: it runs after the test above, and counts what that has seen."""
    right, all_of_them = seen[True, "independent"], sum(count for (truth, _), count in seen.items() if truth)
    assert all_of_them > 0
    assert right / all_of_them > 0.6, seen
