"""The rules are valid, and give the expected results for made-up series."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from tests.observe.prometheus import FOLDER, needs_prometheus

CASES = Path(__file__).with_name("rules_test.yml")


def promtool(*arguments: str | Path) -> None:
    """Run promtool; fails with its output."""
    run = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=FOLDER
    )
    assert run.returncode == 0, run.stdout + run.stderr


@needs_prometheus
def test_the_configuration_and_the_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


@needs_prometheus
def test_the_rules_pass_their_cases() -> None:
    promtool("test", "rules", CASES)


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    """The cases cover every alert."""
    fired = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
        if case["exp_alerts"]
    }
    assert fired == set(re.findall(r"alert: (\S+)", (FOLDER / "rules.yml").read_text()))
