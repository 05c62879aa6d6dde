"""The rules are valid, and give the expected results for made-up series."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from tests.observe.prometheus import FOLDER, ROOT, needs_prometheus

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


def test_every_alert_has_a_section_in_the_runbook() -> None:
    """The link of an alert leads to a heading that is its name."""
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    page = ROOT / "docs" / "operate" / "runbook.md"
    assert [rule["alert"] for rule in alerts] == re.findall(r"^## (\w+)$", page.read_text(), re.MULTILINE)
    for rule in alerts:
        link = f"{page.relative_to(ROOT)}#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook_url"] == link
        assert {"summary", "description"} <= rule["annotations"].keys()
