"""A folder of good and bad models: a bad model fails with a reason, and the good models serve."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from inferpool import cli
from inferpool.observe import logs

from tests.conftest import ROOT, MakeChaos, Serve
from tests.server import Server


def test_one_good_one_corrupt_and_one_misconfigured_model(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "r/good")
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "r/corrupt")
    content = (tmp_path / "r/corrupt/1/model.onnx").read_bytes()
    (tmp_path / "r/corrupt/1/model.onnx").write_bytes(content[: len(content) // 2])
    shutil.copytree(ROOT / "models/diabetes", tmp_path / "r/misconfigured")
    (tmp_path / "r/misconfigured/model.toml").write_text("[batching]\nmax_row = 8\n")
    server = serve(tmp_path / "r")
    models = {model["name"]: model["versions"][0] for model in server.get("/models").json()["models"]}
    assert {name: version["state"] for name, version in models.items()} == {
        "good": "ready", "corrupt": "failed", "misconfigured": "failed",
    }  # fmt: skip
    assert "model.onnx" in models["corrupt"]["reason"]
    reason = models["misconfigured"]["reason"]
    assert "misconfigured/model.toml" in reason
    assert "batching.max_row" in reason
    assert '"max_rows"' in reason
    assert server.post("/predict/good", json={"inputs": [[1.0] * 10]}).status_code == 200
    monkeypatch.setattr(logs, "configure_logs", lambda *_: None)
    capsys.readouterr()
    assert cli.main(["check", str(tmp_path / "r")]) == 1
    printed = capsys.readouterr().out
    assert "2 of 3 versions have failed" in printed
    assert reason in printed


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    """A server of models that only their own tests look at."""
    repository = module_make_chaos("named")
    (repository / "named" / "labels.txt").write_text("no\nyes\n")
    module_make_chaos("m", "[versions]\nlabels = { stable = 1, canary = 3 }\n")
    for version in ("2", "3"):
        shutil.copytree(repository / "m/1", repository / f"m/{version}")
    (repository / "m/2/model.chaos").write_text("broken")
    module_make_chaos("newest")
    for version in ("2", "10"):
        shutil.copytree(repository / "newest/1", repository / f"newest/{version}")
    (repository / "newest/10/model.chaos").write_text("broken")
    for name, answer in (("good", 31.0), ("bad", 31.5)):
        module_make_chaos(name)
        (repository / name / "samples").mkdir()
        sample = {"inputs": [[1, 2, 3, 4]], "outputs": {"sum": [answer]}, "tolerance": 1e-3}
        (repository / name / "samples" / "one.json").write_text(json.dumps(sample))
    module_make_chaos("stale", "[versions]\nlabels = { stable = 1, canary = 3 }\n")
    return module_serve(repository)


def test_names_of_labels_that_are_not_used_are_reported_with_the_line_to_add(server: Server) -> None:
    server.wait_for(r"^named: labels\.txt is not used: add the line \[labels\] to named/model\.toml$")
    assert server.get("/models/named/1").json()["state"] == "ready"


def test_versions_and_labels_choose_who_answers(server: Server) -> None:
    body = {"inputs": [[1, 2, 3, 4]]}
    answers = {
        path: server.post(f"/predict/{path}", json=body).json().get("version")
        for path in ("m", "m/1", "m/stable", "m/3", "m/canary", "m/2")
    }
    assert answers == {"m": "1", "m/1": "1", "m/stable": "1", "m/3": "3", "m/canary": "3", "m/2": None}
    assert server.post("/predict/m", json={**body, "version": "canary"}).json()["version"] == "3"
    assert server.post("/predict/m", json={**body, "version": 3}).json()["version"] == "3"


def test_a_stale_label_fails_and_its_model_serves(server: Server) -> None:
    fault = (
        'stale/model.toml: versions.labels: "canary" names version 3, which is not served; correct the label'
        " or remove it (served: 1)"
    )
    server.wait_for(re.escape(fault))
    health = server.get("/health").json()
    assert (health["status"], health["ready"], health["problems"]["stale"]) == ("degraded", True, fault)
    body = {"inputs": [[1, 2, 3, 4]]}
    assert server.post("/predict/stale/stable", json=body).json()["version"] == "1"
    missing = server.post("/predict/stale/canary", json=body)
    assert (missing.status_code, missing.json()["code"]) == (404, "version_not_found")
    assert server.get("/models/stale/1").json()["labels"] == ["stable"]


def test_the_newest_version_that_is_ready_answers(server: Server) -> None:
    assert server.post("/predict/newest", json={"inputs": [[1, 2, 3, 4]]}).json()["version"] == "2"


def test_a_missed_golden_sample_fails_the_version(server: Server) -> None:
    assert server.get("/models/good/1").json()["state"] == "ready"
    failed = server.get("/models/bad/1").json()
    assert failed["state"] == "failed"
    assert "one.json" in failed["reason"]
    assert "differs by 0.5" in failed["reason"]


def test_a_model_file_and_a_bare_file_are_served_too(serve: Serve, tmp_path: Path) -> None:
    source = ROOT / "models/diabetes/1/model.onnx"
    shutil.copy(source, tmp_path / "risk.onnx")
    body = {"inputs": [[1.0] * 10]}
    assert serve(tmp_path / "risk.onnx").post("/predict", json=body).json()["model"] == "risk"
    # tests/repository/test_single_name.py has every layout.
    assert serve(ROOT / "models/diabetes").post("/predict", json=body).json()["model"] == "diabetes"


def test_nothing_to_serve_is_said_at_once(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "holds no models"), (tmp_path / "nowhere", "does not exist")):
        run = subprocess.run(
            [sys.executable, "-m", "inferpool", "serve", str(path)],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        assert run.returncode == 1
        assert words in run.stderr
        assert "Traceback" not in run.stderr
