"""What the README says is so: its tables are the code's, its examples give the answers it shows."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from inferpool import cli
from inferpool.http.problems import STATUSES
from inferpool.observe.logs import request_fields
from inferpool.observe.metrics import FAMILIES
from inferpool.observe.request_record import RequestRecord
from inferpool.repository.config import ModelConfig
from inferpool.settings import Settings, add_flags
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tests.conftest import Serve
from tests.server import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNABLE = ("sh", "python")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(
        *this,
        *answer,
        id=f"example-{number}",
        marks=[pytest.mark.skipif("curl " in this[1] and not shutil.which("curl"), reason="needs curl")],
    )
    for number, (this, answer) in enumerate(pairwise(BLOCKS))
    if this[0] in RUNNABLE
]
MADE_ID = re.compile(r"[0-9a-f]{16}")
MEASURED = re.compile(r" +\d+ rows in +[\d.]+ ms")
NUMBERS = re.compile(r"\d[\d.e+-]*(, \d[\d.e+-]*)*")


def table(section: str, first_column: str) -> list[list[str]]:
    """The rows of the table below `## section` whose first column is headed so."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = text.partition(f"| {first_column} |")[2].splitlines()[2:]
    rows = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    assert rows, f"no table {first_column} in {section}"
    return [[cell.strip() for cell in row.strip("|").split(" |")] for row in rows]


def code(text: str) -> str:
    """Text as code in Markdown."""
    return f"`{text}`"


def config_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a `model.toml` may have, with what the code knows of it."""
    for name, info in model.model_fields.items():
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is not None:
            yield from config_keys(inner, f"{name}.")
        else:
            yield prefix + name, info


def test_the_settings_table_is_the_codes():
    """Flags, variables, defaults and descriptions of the README are those of `Settings`."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    expected = []
    for action in parser._actions:
        described = re.fullmatch(r"(.*) \[(\w+); default: (.*)\]", action.help or "")
        assert described, action.help
        text, variable, default = described.groups()
        shown = default if default == "none" else code(default)
        expected.append([code(action.option_strings[0]), code(variable), shown, text])
    assert len(expected) == len(Settings.model_fields)
    assert table("Settings", "flag") == expected


def test_help_prints_the_settings_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`inferpool serve --help` has every row of the table, and no flag besides but --config and --help."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    rows = table("Settings", "flag")
    for _, variable, default, description in rows:
        assert f"{description} [{variable.strip('`')}; default: {default.strip('`')}]" in text
    flags = {flag for flag in re.findall(r"--[\w-]+", text.partition("options:")[2]) if "--no-" not in flag}
    assert flags == {row[0].strip("`") for row in rows} | {"--config", "--help"}


def test_the_error_table_is_the_codes():
    """The README lists every error code with its status, and no other."""
    assert {row[0].strip("`"): int(row[1]) for row in table("Errors", "code")} == dict(STATUSES)


def test_the_metrics_table_is_the_codes():
    """Names, kinds, labels and descriptions of the README are those of `FAMILIES`."""
    expected = [
        [code(family.full_name), family.kind, ", ".join(map(code, family.labels)), family.help]
        for family in FAMILIES.values()
    ]
    assert table("Metrics", "metric") == expected


def test_the_table_of_alerts_is_the_rules():
    """The README lists every alert with its severity, and no other."""
    rules = (ROOT / "docker" / "prometheus" / "rules.yml").read_text(encoding="utf-8")
    expected = re.findall(r"alert: (\w+).*?severity: (\w+)", rules, re.DOTALL)
    assert [(row[0].strip("`"), row[1]) for row in table("Watching it", "alert")] == expected


def test_the_table_of_components_is_the_folders():
    """The README lists every component of the manifests, and no other."""
    named = {row[0].strip("`") for row in table("On Kubernetes", "component")}
    assert named == {folder.name for folder in (ROOT / "k8s" / "components").iterdir()}


def test_the_table_of_log_fields_is_the_codes():
    """The README lists every field of a request's line."""
    named = re.findall(r"`(\w+)`", " ".join(row[0] for row in table("Watching it", "field")))
    record = RequestRecord(0.0, "", None, 200, "ok", None, None, None, None, None, None, 0.0, 0, 0)
    assert set(named) == set(request_fields(record))


def test_the_table_of_model_toml_is_the_codes():
    """The README lists every key of a `model.toml`, and no other; a default in code is the one there is."""
    rows = {row[0].strip("`"): row[1] for row in table("model.toml", "key")}
    keys = dict(config_keys(ModelConfig))
    assert rows.keys() == keys.keys()
    for key, info in keys.items():
        default = info.get_default(call_default_factory=True)
        if info.is_required() or default is None or default == {}:
            assert not rows[key].startswith("`"), key
        else:
            assert tomllib.loads(f"default = {rows[key].strip('`')}") == {"default": default}, key


def test_the_table_of_extras_is_the_projects():
    """The README names every extra of the project, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {name for row in table("Install without the scripts", "extra") for name in row[0].split(", ")}
    assert named == set(map(code, project["optional-dependencies"]))


def test_every_route_is_in_the_readme(bundled: Server):
    """Each path of the API's own document stands in the README, but for those of a model by name."""
    served = [f"/{model['name']}" for model in bundled.get("/models").json()["models"]]
    for path in bundled.get("/openapi.json").json()["paths"]:
        if any(name in path for name in served):
            continue
        assert re.search(f"[` ]{re.sub('{(.*?)}', lambda m: m[1].upper(), path)}`", README), path


def test_every_example_has_an_answer():
    """What the README tells to run is followed by what it answers."""
    assert len(EXAMPLES) >= 6
    assert {example.values[2] for example in EXAMPLES} == {"json", "text"}


@pytest.mark.parametrize(("language", "source", "kind", "shown"), EXAMPLES)
def test_an_example_gives_the_answer_shown(
    language: str, source: str, kind: str, shown: str, bundled: Server, models: Path, cache_dir: Path
):
    """Commands and programs of the README, run as they stand, print what stands below them."""
    source = source.replace("localhost:8000", f"127.0.0.1:{bundled.port}")
    source = source.replace(".venv/bin/inferpool", f"'{sys.executable}' -m inferpool")
    command = [sys.executable, "-c", source] if language == "python" else ["bash", "-euc", source]
    environ = {**os.environ, "INFERPOOL_CACHE_DIR": str(cache_dir), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=models.parent, env=environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    if kind == "json":
        assert_alike(json.loads(shown), json.loads(run.stdout))
    else:
        assert same_but_for_measurements(run.stdout) == same_but_for_measurements(shown)


def assert_alike(shown: Any, given: Any) -> None:
    """JSON values are equal, up to rounding and the ids that the server makes."""
    if isinstance(shown, dict):
        assert shown.keys() == given.keys()
        for key in shown:
            assert_alike(shown[key], given[key])
    elif isinstance(shown, list):
        assert len(shown) == len(given)
        for one, other in zip(shown, given, strict=True):
            assert_alike(one, other)
    elif isinstance(shown, str) and MADE_ID.fullmatch(shown):
        assert MADE_ID.fullmatch(given)
    else:
        assert given == (pytest.approx(shown, rel=1e-4) if isinstance(shown, float) else shown)


def same_but_for_measurements(text: str) -> list[str]:
    """The lines of a text, without what differs from machine to machine."""
    lines = []
    for line in text.splitlines():
        if line.startswith(("  batching", "  runs")):
            lines.append(re.sub(r"(instance|thread)s", r"\1", NUMBERS.sub("#", line)))
        elif "not built yet" in line:
            # The command is printed as it works where this runs.
            lines.append(re.sub(r"; .* build ", "; … build ", line))
        elif not MEASURED.fullmatch(line):
            lines.append(re.sub(r"\d+\.\d+", lambda match: f"{float(match[0]):.6g}", line))
    return lines


@pytest.fixture
def without_runtime(tmp_path: Path) -> str:
    """A PYTHONPATH on which ONNX Runtime cannot be imported."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not installed')\n")
    return f"{tmp_path}:{ROOT}"


def test_without_a_runtime_models_fail_with_the_reason(serve: Serve, models: Path, without_runtime: str):
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


def test_check_says_that_no_runtime_is_installed(models: Path, without_runtime: str):
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
