"""`inferpool build` runs a script with the packages that it needs; `serve` leaves out unbuilt models."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.cli import main
from inferpool.errors import ConfigError
from inferpool.release.build import missing_packages

from tests.conftest import ROOT
from tests.models.built import build
from tests.server import Server

NEEDS = """\
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   {needs},
# ]
# ///
"""
SCRIPT = """\
import json, sys
from pathlib import Path
Path(__file__).with_name("ran.json").write_text(json.dumps([sys.executable, *sys.argv[1:]]))
print("built")
sys.exit(7)
"""


def add_model(repository: Path, name: str, script: str, description: str = "") -> Path:
    folder = repository / name
    folder.mkdir(parents=True)
    (folder / "build.py").write_text(script)
    (folder / "model.toml").write_text(f'description = "{description}"\n')
    return folder


Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Run a command that starts no other program in this process; returns its status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([*map(str, arguments)])
        return (status, *capsys.readouterr())

    return run


def write_wheel(folder: Path, version: str) -> None:
    """A distribution `inferpool-tiny` of one module, which holds its version."""
    folder.mkdir(exist_ok=True)
    info = f"inferpool_tiny-{version}.dist-info"
    with zipfile.ZipFile(folder / f"inferpool_tiny-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("inferpool_tiny.py", f"VERSION = {version!r}\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: inferpool-tiny\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_this_python_runs_a_script_whose_packages_are_installed(tmp_path: Path) -> None:
    """The options, the output and the exit status are those of the script."""
    folder = add_model(
        tmp_path, "here", NEEDS.format(needs='"numpy>=1", "no-such-thing; python_version < \'3\'"') + SCRIPT
    )
    run = build(tmp_path, "here", "--rows", "3", "--help")
    assert (run.returncode, run.stdout, run.stderr) == (7, "built\n", "")
    assert (folder / "ran.json").read_text() == f'["{sys.executable}", "--rows", "3", "--help"]'


def test_this_python_runs_a_script_without_metadata(tmp_path: Path) -> None:
    add_model(tmp_path, "plain", SCRIPT)
    assert build(tmp_path, "plain").returncode == 7


def uv_only(tmp_path: Path) -> dict[str, str]:
    """Return variables that give uv one folder of wheels as its only source, and a cache of its own."""
    return {
        "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(tmp_path / "wheels"),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "UV_PYTHON": sys.executable,
    }  # fmt: skip


def test_uv_installs_missing_packages_in_an_environment_of_their_own(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "1.5")
    script = (
        NEEDS.format(needs='"inferpool-tiny==1.5"')
        + "import sys, inferpool_tiny\nprint(inferpool_tiny.__file__, *sys.argv[1:])\nsys.exit(7)\n"
    )
    add_model(tmp_path / "models", "apart", script)
    run = build(tmp_path / "models", "apart", "--rows", "3", **uv_only(tmp_path))
    assert run.returncode == 7, run.stderr
    assert run.stdout.startswith(str(tmp_path / "cache"))
    assert run.stdout.endswith("inferpool_tiny.py --rows 3\n")
    assert "apart: the build script needs inferpool-tiny==1.5, not installed here" in run.stderr


def test_a_package_that_cannot_be_installed_is_named(tmp_path: Path) -> None:
    folder = add_model(tmp_path / "models", "apart", NEEDS.format(needs='"inferpool-tiny==1.5"') + SCRIPT)
    write_wheel(tmp_path / "wheels", "1.4")
    run = build(tmp_path / "models", "apart", **uv_only(tmp_path))
    assert run.returncode == 1
    assert "inferpool-tiny==1.5" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (folder / "ran.json").exists()


def test_without_uv_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_model(tmp_path, "apart", NEEDS.format(needs='"inferpool-tiny==1.5"') + SCRIPT)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["build", "--repository", str(tmp_path), "apart"]) == 1
    message = capsys.readouterr().err
    assert "apart: the build script needs inferpool-tiny==1.5, not installed here" in message
    assert message.rstrip().endswith("python -m pip install 'inferpool[build]'")


def test_a_signal_ends_the_script_itself(tmp_path: Path) -> None:
    """The script replaces the process of the command: a signal to the command ends the script."""
    add_model(tmp_path, "slow", "import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "inferpool", "build", "--repository", str(tmp_path), "slow"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stdout.readline() == "begun\n"
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == -signal.SIGTERM


def test_without_a_name_it_lists_the_models(tmp_path: Path, told: Told) -> None:
    add_model(tmp_path, "fresh", SCRIPT, "Not there yet")
    (add_model(tmp_path, "b", SCRIPT, "There") / "1").mkdir()
    (tmp_path / "no-script").mkdir()
    (tmp_path / "build.py").write_text("raise SystemExit('the repository itself is no model')")
    _, listed, _ = told("build", "--repository", tmp_path)
    assert listed.splitlines() == ["b      built      There", "fresh  not built  Not there yet"]
    for name in ("nope", "../fresh", "no-script"):
        status, output, errors = told("build", "--repository", tmp_path, name)
        assert (status, output) == (1, "")
        assert f'has no build script for "{name}"; there are "b", "fresh"' in errors
    for folder in ("no-script", "nowhere"):
        status, _, errors = told("build", "--repository", tmp_path / folder)
        assert status == 1
        assert "has no models to build" in errors
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "build", "digits"], cwd=tmp_path / "fresh",
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert (
        f"expected models/NAME/build.py in {tmp_path / 'fresh'}; name another folder with --repository FOLDER"
        in run.stderr
    )


def test_only_models_that_could_be_served_are_listed(tmp_path: Path, told: Told) -> None:
    """Hidden folders, unprintable names, and folders called build.py are not models to build."""
    add_model(tmp_path, "good", SCRIPT, "Good")
    others = ("_hidden", ".hidden", "two\nlines", "\x1b[2Jclear", os.fsdecode(b"\xff"))
    for name in others:
        add_model(tmp_path, name, SCRIPT)
    (tmp_path / "folder" / "build.py").mkdir(parents=True)
    assert told("build", "--repository", tmp_path) == (0, "good  not built  Good\n", "")
    for name in (*others, "folder"):
        status, _, errors = told("build", "--repository", tmp_path, name)
        assert status == 1
        assert 'there is "good"' in errors or 'there are "good"' in errors
        assert not (tmp_path / name / "ran.json").exists()
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "serve", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "none of good is built yet" in run.stderr


def test_unprintable_characters_are_escaped_in_the_listing(tmp_path: Path) -> None:
    """A description cannot start a new line or control the terminal."""
    add_model(tmp_path, "a", SCRIPT, r"red \u001b[31m\nb  built  \u202e \u0007é")
    listed = build(tmp_path, PYTHONUTF8="1").stdout
    assert listed == "a  not built  red \\x1b[31m\\nb  built  \\u202e \\x07é\n"


def test_a_damaged_folder_does_not_affect_the_others(tmp_path: Path, told: Told) -> None:
    bad = add_model(tmp_path, "bad", "# /// script\n# dependencies = [\n# ///\n")
    (bad / "model.toml").write_text("descripton = 'misspelt'\n")
    add_model(tmp_path, "good", SCRIPT, "Good")
    listed = told("build", "--repository", tmp_path)[1].splitlines()
    assert listed[0].startswith("bad   not built  bad/model.toml: descripton: unknown key")
    assert listed[1] == "good  not built  Good"
    assert build(tmp_path, "good").returncode == 7
    status, _, errors = told("build", "--repository", tmp_path, "bad")
    assert status == 1
    assert "bad/build.py: the metadata of the script cannot be read" in errors


def test_the_projects_own_models_are_the_default() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "build"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {line.split()[0] for line in run.stdout.splitlines()}
    assert names == {file.parent.name for file in (ROOT / "models").glob("*/build.py")}
    assert {"cifar10", "diabetes", "digits", "forecast", "resnet50"} <= names


@pytest.mark.parametrize(
    "script", sorted((ROOT / "models").glob("*/build.py")), ids=lambda file: file.parent.name
)
def test_the_extra_test_has_the_packages_of_the_projects_scripts(script: Path) -> None:
    """The tests build every model with this Python, and not in an environment that takes minutes to make."""
    assert "# dependencies = [" in script.read_text()
    assert missing_packages(script) == []


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (NEEDS.format(needs='"numpy >"'), "metadata of the script cannot be read"),
        (NEEDS.format(needs="1"), "metadata of the script cannot be read"),
        (NEEDS.format(needs="numpy"), "metadata of the script cannot be read"),
        (NEEDS.format(needs='"numpy"') + "\n" + NEEDS.format(needs='"numpy"'), "2 blocks of metadata"),
            ('# /// script\n# requires-python = 3\n# ///\n', "metadata of the script cannot be read"),
        ('# /// script\n# dependencies = 3\n# ///\n', "metadata of the script cannot be read"),
    ],
)  # fmt: skip
def test_damaged_metadata_is_refused_with_the_scripts_name(tmp_path: Path, block: str, words: str) -> None:
    script = add_model(tmp_path, "model", block + SCRIPT) / "build.py"
    with pytest.raises(ConfigError, match=words) as refused:
        missing_packages(script)
    assert "model/build.py" in refused.value.detail


def test_requirements_that_a_version_cannot_meet_count_as_missing(tmp_path: Path) -> None:
    """An extra and a URL may need packages that are not installed; uv also brings another Python."""
    wanted = ("numpy", "numpy[extra]", "numpy @ https://example.org/n.whl", "numpy<1")
    needs = NEEDS.format(needs='", "'.join(("", *wanted, ""))[3:-3]).replace(">=3.11", ">=9")
    script = add_model(tmp_path, "model", needs + SCRIPT) / "build.py"
    assert missing_packages(script) == [*wanted[1:], "Python >=9"]


@given(st.text('#/ script\n=[]"a', max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    script = tmp_path_factory.mktemp("script") / "build.py"
    script.write_text(f"# /// script\n{text}\n# ///\n")
    with contextlib.suppress(ConfigError):
        assert isinstance(missing_packages(script), list)


def test_the_log_names_the_command_for_each_model_that_is_not_built(bundled: Server, models: Path) -> None:
    server = bundled
    assert {model["name"] for model in server.get("/models").json()["models"]} == {
        "diabetes",
        "digits",
        "forecast",
        "next-word",
    }
    assert server.get("/health/ready").status_code == 200
    assert server.get("/health").json() == {"status": "ok", "ready": True, "problems": {}}
    for name in ("cifar10", "minilm", "news", "resnet50", "sentiment"):
        said = [line for line in server.log if name in line["message"]]
        (line,) = said
        assert line["level"] == "info"
        message = f"{name} is skipped until it is built: run (.+) build --repository {models} {name}"
        assert re.fullmatch(message, line["message"])
        assert server.post(f"/predict/{name}", json={"inputs": [[1]]}).json()["code"] == "model_not_found"


def test_a_repository_without_a_built_model_says_how_to_build(tmp_path: Path, told: Told) -> None:
    add_model(tmp_path / "my models", "fresh", SCRIPT)
    how = rf"run .+ build --repository '{tmp_path}/my models' fresh"
    for path, words in (
        (tmp_path / "my models", "none of fresh is built yet"),
        (tmp_path / "my models/fresh", "is not built yet"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", "inferpool", "serve", str(path)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        status, _, errors = told("check", path)
        assert (run.returncode, status) == (1, 1)
        for said in (run.stderr, errors):
            assert words in said
            assert re.search(how, said)


@pytest.mark.parametrize("found", [True, False])
def test_a_printed_command_works(tmp_path: Path, found: bool) -> None:
    """The environment of the server may be active or not, and another pip may come first on the PATH."""
    add_model(tmp_path / "models", "fresh", SCRIPT)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("inferpool", "pip") if found else ("pip",):
        (folder / name).write_text(f"#!/bin/sh\nexec '{sys.executable}' -m inferpool \"$@\"\n")
        (folder / name).chmod(0o755)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder}:/bin:/usr/bin"}
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "check", str(tmp_path / "models")],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    command = run.stderr.rpartition(": run ")[2].strip()
    assert command.startswith("inferpool build") == found
    again = subprocess.run(command, shell=True, cwd=tmp_path, env=environ, check=False)
    assert again.returncode == 7, "the script's own"
    code = (
        "from inferpool.system.install_hints import *;"
        " print(uninstall_command('x'), '&&', install_command('text'))"
    )
    hints = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    pip = f"{sys.executable} -m pip"
    assert hints.stdout.strip() == f"{pip} uninstall x && {pip} install 'inferpool[text]'"


ASKED = """\
import argparse, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True, metavar="FILE")
options = parser.parse_args()
Path(__file__).with_name("went-on").touch()
import inferpool_tiny
print(inferpool_tiny.VERSION, options.data)
"""


def test_the_help_of_a_script_needs_no_packages(tmp_path: Path) -> None:
    folder = add_model(tmp_path / "models", "apart", NEEDS.format(needs='"inferpool-tiny==1.5"') + ASKED)
    run = build(tmp_path / "models", "apart", "--help", **uv_only(tmp_path))
    assert (run.returncode, run.stderr) == (0, "")
    assert "--data FILE" in run.stdout
    assert not (folder / "went-on").exists()


@pytest.mark.parametrize(
    "script", sorted((ROOT / "models").glob("*/build.py")), ids=lambda file: file.parent.name
)
def test_the_projects_scripts_print_their_help_without_packages(script: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-S", str(script), "--help"], env={}, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "usage: build.py" in run.stdout
