"""`inferpool build` runs a script where all that it needs is; `serve` leaves out what is not built."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import ConfigError
from inferpool.release import read_options
from inferpool.release.build import missing, read_requirements, script_blocks
from packaging.requirements import Requirement

from tests.conftest import ROOT, Serve
from tests.models.built import build

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


def test_a_script_runs_here_where_everything_is_installed(tmp_path: Path) -> None:
    """Its options, its output and its exit status are its own."""
    folder = add_model(
        tmp_path, "here", NEEDS.format(needs='"numpy>=1", "no-such-thing; python_version < \'3\'"') + SCRIPT
    )
    run = build(tmp_path, "here", "--rows", "3", "--help")
    assert (run.returncode, run.stdout, run.stderr) == (7, "built\n", "")
    assert (folder / "ran.json").read_text() == f'["{sys.executable}", "--rows", "3", "--help"]'


def test_a_script_without_metadata_runs_here(tmp_path: Path) -> None:
    add_model(tmp_path, "plain", SCRIPT)
    assert build(tmp_path, "plain").returncode == 7


def test_what_is_missing_is_installed_once_in_an_environment_of_its_own(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "1.5")
    script = (
        NEEDS.format(needs='"inferpool-tiny==1.5"')
        + "import inferpool_tiny\nprint(inferpool_tiny.__file__)\n"
    )
    add_model(tmp_path / "models", "apart", script)
    environ = {"INFERPOOL_CACHE_DIR": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}
    run = build(tmp_path / "models", "apart", **environ, PIP_FIND_LINKS=str(tmp_path / "wheels"))
    assert run.returncode == 0, run.stderr
    module = Path(run.stdout.strip())
    assert module.is_relative_to(tmp_path / "cache")
    assert "inferpool-tiny==1.5, which is not installed here" in run.stderr
    # The second time nothing is installed, and nothing need be there to install from.
    run = build(tmp_path / "models", "apart", **environ)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{module}\n", "")


def test_an_environment_that_was_not_finished_is_made_anew(tmp_path: Path) -> None:
    script = NEEDS.format(needs='"inferpool-tiny==1.5"') + "import inferpool_tiny\n"
    add_model(tmp_path / "models", "apart", script)
    write_wheel(tmp_path / "wheels", "1.4")
    environ = {
        "INFERPOOL_CACHE_DIR": str(tmp_path / "cache"), "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
    }  # fmt: skip
    run = build(tmp_path / "models", "apart", **environ)
    assert run.returncode == 1
    assert "this failed, and nothing was built" in run.stderr
    assert "pip install" in run.stderr
    assert "Traceback" not in run.stderr
    write_wheel(tmp_path / "wheels", "1.5")
    assert build(tmp_path / "models", "apart", **environ).returncode == 0


def test_a_signal_ends_the_script_itself(tmp_path: Path) -> None:
    """The script takes the command's place: who stops the command stops it."""
    add_model(tmp_path, "slow", "import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "inferpool", "build", "--repository", str(tmp_path), "slow"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stdout.readline() == "begun\n"
        run.send_signal(signal.SIGTERM)
        assert run.wait(10) == -signal.SIGTERM


def test_without_a_name_it_lists_what_there_is(tmp_path: Path) -> None:
    add_model(tmp_path, "fresh", SCRIPT, "Not there yet")
    (add_model(tmp_path, "b", SCRIPT, "There") / "1").mkdir()
    (tmp_path / "no-script").mkdir()
    (tmp_path / "build.py").write_text("raise SystemExit('the repository itself is no model')")
    run = build(tmp_path)
    assert run.stdout.splitlines() == ["b      built      There", "fresh  not built  Not there yet"]
    for name in ("nope", "../fresh", "no-script"):
        run = build(tmp_path, name)
        assert (run.returncode, run.stdout) == (1, "")
        assert f'has no build script for "{name}"; there are "b", "fresh"' in run.stderr
    for folder in ("no-script", "nowhere"):
        run = build(tmp_path / folder)
        assert run.returncode == 1
        assert "has no models to build" in run.stderr
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "build", "digits"], cwd=tmp_path / "fresh",
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert f"expected models/NAME/build.py in {tmp_path / 'fresh'}; --repository FOLDER" in run.stderr


def test_only_models_that_could_be_served_are_listed(tmp_path: Path) -> None:
    """Hidden folders, names that no path can have, and folders called build.py are no models to build."""
    add_model(tmp_path, "good", SCRIPT, "Good")
    others = ("_hidden", ".hidden", "two\nlines", "\x1b[2Jclear", os.fsdecode(b"\xff"))
    for name in others:
        add_model(tmp_path, name, SCRIPT)
    (tmp_path / "folder" / "build.py").mkdir(parents=True)
    assert build(tmp_path).stdout == "good  not built  Good\n"
    for name in (*others, "folder"):
        assert build(tmp_path, name).returncode == 1
        assert not (tmp_path / name / "ran.json").exists()
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "serve", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "none of good is built yet" in run.stderr


def test_what_cannot_be_printed_is_escaped_in_the_listing(tmp_path: Path) -> None:
    """A description can neither make lines of its own nor speak to the terminal."""
    add_model(tmp_path, "a", SCRIPT, r"red \u001b[31m\nb  built  \u202e \u0007é")
    listed = build(tmp_path, PYTHONUTF8="1").stdout
    assert listed == "a  not built  red \\x1b[31m\\nb  built  \\u202e \\x07é\n"


def test_a_damaged_folder_is_its_own_trouble(tmp_path: Path) -> None:
    """The others are listed and built."""
    bad = add_model(tmp_path, "bad", "# /// script\n# dependencies = [\n# ///\n")
    (bad / "model.toml").write_text("descripton = 'misspelt'\n")
    add_model(tmp_path, "good", SCRIPT, "Good")
    listed = build(tmp_path).stdout.splitlines()
    assert listed[0].startswith("bad   not built  bad/model.toml: descripton: unknown key")
    assert listed[1] == "good  not built  Good"
    assert build(tmp_path, "good").returncode == 7
    run = build(tmp_path, "bad")
    assert run.returncode == 1
    assert "bad/build.py: its metadata cannot be read" in run.stderr


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
def test_the_tests_have_what_the_projects_scripts_need(script: Path) -> None:
    """So that the tests build every model here, and not in an environment that takes minutes to make."""
    requirements = read_requirements(script)
    assert requirements
    assert missing(requirements) == []


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (NEEDS.format(needs='"numpy >"'), "its metadata cannot be read"),
        (NEEDS.format(needs="1"), "its metadata cannot be read"),
        (NEEDS.format(needs="numpy"), "its metadata cannot be read"),
        (NEEDS.format(needs='"numpy"') + "\n" + NEEDS.format(needs='"numpy"'), "2 blocks of metadata"),
        ('# /// script\n# requires-python = ">=9"\n# ///\n', "needs Python >=9"),
        ('# /// script\n# requires-python = 3\n# ///\n', "its metadata cannot be read"),
        ('# /// script\n# dependencies = 3\n# ///\n', "its metadata cannot be read"),
    ],
)  # fmt: skip
def test_damaged_metadata_is_refused_with_the_scripts_name(tmp_path: Path, block: str, words: str) -> None:
    script = add_model(tmp_path, "model", block + SCRIPT) / "build.py"
    with pytest.raises(ConfigError, match=words) as refused:
        read_requirements(script)
    assert "model/build.py" in refused.value.detail


def test_what_cannot_be_told_from_a_version_counts_as_missing() -> None:
    wanted = [
        Requirement(text)
        for text in ("numpy", "numpy[extra]", "numpy @ https://example.org/n.whl", "numpy<1")
    ]
    assert [str(requirement) for requirement in missing(wanted)] == [str(one) for one in wanted[1:]]


@given(st.text('#/ script\n=[]"a', max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    script = tmp_path_factory.mktemp("script") / "build.py"
    script.write_text(f"# /// script\n{text}\n# ///\n")
    with contextlib.suppress(ConfigError):
        assert isinstance(read_requirements(script), tuple)


PEP_723 = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
"""The regular expression that PEP 723 gives for its blocks."""
LINES = ("# /// script", "# /// other", "# ///", "#", "# a", "#a", "", "a", " # ///", "# /// script ", "# \f")


@given(st.lists(st.sampled_from(LINES), max_size=12), st.booleans())
def test_blocks_are_those_that_pep_723s_regular_expression_finds(lines: list[str], ends: bool) -> None:
    text = "\n".join(lines) + "\n" * ends
    found = [block for block in re.finditer(PEP_723, text) if block["type"] == "script"]
    expected = ["\n".join(line[2:] for line in block["content"][:-1].split("\n")) for block in found]
    assert script_blocks(text) == expected


@pytest.mark.timeout(20)
def test_finding_blocks_takes_time_that_grows_with_the_text() -> None:
    """By the regular expression these lines take an hour."""
    assert script_blocks("# /// script\n" * 200_000) == []


def test_what_is_not_built_is_left_out_and_its_command_is_logged(serve: Serve, models: Path) -> None:
    server = serve(models)
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
        told = f"{name} is left out until it is built: run (.+) build --repository {models} {name}"
        assert re.fullmatch(told, line["message"])
        assert server.post(f"/predict/{name}", json={"inputs": [[1]]}).json()["code"] == "model_not_found"


def test_a_repository_of_nothing_built_says_how_to_build(tmp_path: Path) -> None:
    add_model(tmp_path / "my models", "fresh", SCRIPT)
    for path, words in (
        (tmp_path / "my models", "none of fresh is built yet"),
        (tmp_path / "my models/fresh", "is not built yet"),
    ):
        for command in ("serve", "check"):
            run = subprocess.run(
                [sys.executable, "-m", "inferpool", command, str(path)],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert run.returncode == 1
            assert words in run.stderr
            assert re.search(rf"run .+ build --repository '{tmp_path}/my models' fresh", run.stderr)


@pytest.mark.parametrize("found", [True, False])
def test_a_command_that_is_printed_works_as_it_stands(tmp_path: Path, found: bool) -> None:
    """Whether or not the environment that runs is active, and with another one's pip in front."""
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
    code = "from inferpool.system.install_hints import *; print(uninstall_command('x'), '&&', install_command('text'))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    pip = f"{sys.executable} -m pip"
    assert told.stdout.strip() == f"{pip} uninstall x && {pip} install 'inferpool[text]'"


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


def test_help_and_mistakes_are_answered_before_anything_is_installed(tmp_path: Path) -> None:
    folder = add_model(tmp_path / "models", "apart", NEEDS.format(needs='"inferpool-tiny==1.5"') + ASKED)
    write_wheel(tmp_path / "wheels", "1.5")
    cache = tmp_path / "cache"
    environ = {"INFERPOOL_CACHE_DIR": str(cache), "PIP_NO_INDEX": "1"}
    run = build(tmp_path / "models", "apart", "--help", **environ)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--data FILE" in run.stdout
    for wrong in ((), ("--date", "x")):
        run = build(tmp_path / "models", "apart", *wrong, **environ)
        assert (run.returncode, run.stdout) == (2, "")
        assert "usage: build.py" in run.stderr
        assert "arguments are required: --data" in run.stderr
    assert not cache.exists()
    assert not (folder / "went-on").exists()
    environ["PIP_FIND_LINKS"] = str(tmp_path / "wheels")
    run = build(tmp_path / "models", "apart", "--data", "x", **environ)
    assert (run.returncode, run.stdout) == (0, "1.5 x\n"), run.stderr


def test_a_script_that_knows_no_options_is_not_tried(tmp_path: Path) -> None:
    """It would only do its work, without what it needs."""
    folder = add_model(tmp_path / "models", "apart", NEEDS.format(needs='"inferpool-tiny==1.5"') + SCRIPT)
    run = build(tmp_path / "models", "apart", INFERPOOL_CACHE_DIR=str(tmp_path / "cache"), PIP_NO_INDEX="1")
    assert run.returncode == 1
    assert "this failed, and nothing was built" in run.stderr
    assert not (folder / "ran.json").exists()


def test_scripts_of_equal_needs_share_an_environment(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "1.5")
    script = (
        NEEDS.format(needs='"inferpool-tiny==1.5"')
        + "import inferpool_tiny\nprint(inferpool_tiny.__file__)\n"
    )
    environ = {"INFERPOOL_CACHE_DIR": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}
    add_model(tmp_path / "models", "one", script)
    one = build(tmp_path / "models", "one", **environ, PIP_FIND_LINKS=str(tmp_path / "wheels"))
    add_model(tmp_path / "models", "other", script)
    other = build(tmp_path / "models", "other", **environ)
    assert (other.returncode, other.stdout, other.stderr) == (0, one.stdout, "")


@pytest.mark.parametrize(
    "script", sorted((ROOT / "models").glob("*/build.py")), ids=lambda file: file.parent.name
)
def test_the_projects_scripts_give_their_help_without_what_they_need(script: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-S", "-P", read_options.__file__, str(script), "--help"],
        env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert "usage: build.py" in run.stdout
