"""No random program that is called independent answers a row otherwise in company than alone."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from inferpool.backends.row_verdict import Independence
from inferpool.backends.torch.row_analysis.exported import analyse

from tests.backends.torch.networks import export
from tests.backends.torch.row_analysis.random_programs import Network, random_networks, rows_are_independent
from tests.record import needs_to_run

PROGRAMS = int(os.environ.get("ROW_ANALYSIS_PROGRAMS", "30"))
"""How many programs are exported; `scripts/test --full` exports more."""


@pytest.fixture(scope="module", autouse=True)
def only_after_a_change() -> None:
    needs_to_run("torch")


seen: Counter[tuple[bool, str]] = Counter()


@settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_networks())
def test_no_mixing_program_is_called_independent(made: tuple[Network, torch.Tensor]) -> None:
    from torch._export.serde.serialize import serialize  # late, because it takes a second

    network, x = made
    try:
        program = export(network, x)
    except Exception:  # noqa: BLE001 - what cannot be exported is not served
        event("not exported")
        return
    verdict = analyse(json.loads(serialize(program).exported_program))
    truth = rows_are_independent(program.module(), x)
    seen[truth, verdict.independence.value] += 1
    event(f"{verdict.independence.value}, in truth {'independent' if truth else 'mixed'}")
    if verdict.independence is Independence.INDEPENDENT:
        assert truth, f"{verdict.reason}\n{[name for name, _ in network.chosen]}\n{program}"


def test_most_independent_programs_are_called_so() -> None:
    """The analysis is of use: it runs after the test above, and counts what that has seen."""
    right, all_of_them = seen[True, "independent"], sum(count for (truth, _), count in seen.items() if truth)
    assert all_of_them > 0
    assert right / all_of_them > 0.6, seen
