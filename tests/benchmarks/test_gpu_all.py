"""The script for a machine with a GPU runs to its end on the CPU, in its smallest form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.record import needs_to_run
from tests.server import ROOT


@pytest.mark.timeout(240)
def test_all_steps_are_reported_and_their_figures_are_kept(tmp_path: Path) -> None:
    needs_to_run("benchmarks")
    script = [sys.executable, "benchmarks/gpu_all.py", "--device", "cpu", "--out", str(tmp_path)]
    ran = subprocess.run(
        [*script, "--steps", "facts,served,precision"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not ran.returncode, ran.stdout + ran.stderr
    for step in ("facts", "served", "precision"):
        assert f"| {step} | done | " in ran.stdout
        assert (tmp_path / f"{step}.log").stat().st_size
    [served] = tmp_path.glob("gpu-small-*.md")
    assert "| small | plain | " in served.read_text()
    assert "| small | FP16 | " in next(tmp_path.glob("gpu-precision-small-*.md")).read_text()


def test_a_step_ends_with_its_time_and_the_others_still_run(tmp_path: Path) -> None:
    script = [sys.executable, "benchmarks/gpu_all.py", "--device", "cpu", "--out", str(tmp_path)]
    ran = subprocess.run(
        [*script, "--steps", "facts,served", "--minutes", "0.001"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "| facts | no time left | 0 |" in ran.stdout
    assert "| served | no time left | 0 |" in ran.stdout
