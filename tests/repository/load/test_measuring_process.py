"""When a process of its own measures a version, and when it is given up."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from inferpool.repository.lifecycle import LOAD, MEASURE, PHASES, PROVE, VERIFY, WARM, Phase
from inferpool.repository.load import measuring_process
from inferpool.repository.load.measuring_process import (
    LEAST_SHARE,
    PATIENCE_S,
    PROCESS_BYTES,
    WORTH_BUDGET_S,
    WORTH_BYTES,
    CoreShare,
    LoadPhases,
    MeasureRequest,
    has_room,
    is_worth_a_process,
    measure_apart,
)
from inferpool.system.priority import run_at_low_priority, run_only_on_idle_cores


def test_a_process_is_worth_its_start_for_large_models_and_long_measurements() -> None:
    assert is_worth_a_process(WORTH_BYTES, 0)
    assert is_worth_a_process(0, WORTH_BUDGET_S)
    assert not is_worth_a_process(WORTH_BYTES - 1, WORTH_BUDGET_S / 2)


def test_a_process_needs_room_for_the_model_beside_what_is_held() -> None:
    limit = PROCESS_BYTES + 3 * 100 + 50
    assert has_room(100, limit, 50)
    assert not has_room(100, limit, 51)


def test_a_process_without_a_core_is_given_up() -> None:
    share = CoreShare()
    assert not share.is_starved(1.0, 0.5)
    assert not share.is_starved(1.0, PATIENCE_S)
    assert share.is_starved(1.0, 0.5 + PATIENCE_S)
    # What it runs meanwhile counts, and so does a thread that ends and takes its times with it.
    enough = LEAST_SHARE * PATIENCE_S
    assert not share.is_starved(1.0 + enough, 0.5 + PATIENCE_S)
    assert not share.is_starved(0.5, 0.1)
    assert share.is_starved(0.5 + 0.9 * enough, 0.1 + PATIENCE_S)


def test_each_phase_is_told_once_and_in_order() -> None:
    """The process that serves verifies and loads once more what another one has measured."""
    told: list[Phase] = []
    phases = LoadPhases(told.append)
    for phase in (VERIFY, LOAD, PROVE, MEASURE, VERIFY, LOAD, WARM):
        phases.enter(phase)
    assert told == [VERIFY, LOAD, PROVE, MEASURE, WARM]
    assert sorted(told, key=PHASES.index) == told


def test_a_process_that_finds_no_idle_core_begins_again_at_a_low_priority(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: dict[object, Mapping[str, str] | None] = {
        run_only_on_idle_cores: None,
        run_at_low_priority: {"a": "plan"},
    }
    monkeypatch.setattr(
        measuring_process, "_try", lambda request, plans, waiting, lower, share: made.pop(lower)
    )
    request = MeasureRequest("m", 1, "model.onnx", None, {}, {"load_timeout_s": 600.0}, None, remeasure=False)
    assert measure_apart(request, {}, lambda phase: None, lambda: False, lambda: 0.0) == {"a": "plan"}
    assert not made
