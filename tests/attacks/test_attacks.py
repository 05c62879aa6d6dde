"""The attacks of `scripts/attack`, for a short time, against a server of the sources."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.attacks.attacks import ATTACKS
from tests.attacks.report import run

SECONDS = 12
LIVE_MS, SLOWER = 5000.0, 200.0
"""A machine that runs other tests meanwhile says little about times; without the bounds they were 40 s."""


def test_good_requests_are_answered_while_a_small_server_is_attacked(models: Path, cache_dir: Path) -> None:
    outcome = run(models, cache_dir, SECONDS, tuple(ATTACKS), sys.executable)
    assert not outcome.faults(LIVE_MS, SLOWER), outcome.text()
    assert outcome.attacked.requests > outcome.quiet.requests > 100
    assert sum(outcome.rounds.values()) >= 3
