"""The page on installing is right about a server without a runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.docs.pages import ROOT


@pytest.fixture
def without_runtime(tmp_path: Path) -> str:
    """A PYTHONPATH on which ONNX Runtime cannot be imported."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not installed')\n")
    return f"{tmp_path}:{ROOT}"


def test_without_a_runtime_models_fail_with_the_reason(
    serve: Serve, models: Path, without_runtime: str
) -> None:
    """Where no extra is installed the server starts, and says what to install."""
    server = serve(models, PYTHONPATH=without_runtime)
    for model in server.get("/models").json()["models"]:
        for version in model["versions"]:
            assert version["state"] == "failed"
            assert "pip install 'inferpool[cpu]'" in version["reason"]
    assert server.get("/health/live").status_code == 200
    assert server.get("/health/ready").status_code == 503
    answer = server.post("/predict/diabetes", json={"inputs": [[0] * 10]})
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert server.metric("build_info", onnx="not installed") == 1


def test_check_says_that_no_runtime_is_installed(models: Path, without_runtime: str) -> None:
    """`inferpool check` exits with 1 and gives the reason for every version."""
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "check", "models"],
        cwd=models.parent,
        env={**os.environ, "PYTHONPATH": without_runtime},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout.count("pip install 'inferpool[cpu]'") == 4
    assert "4 of 4 versions have failed" in run.stdout
