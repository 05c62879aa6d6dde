"""The compiled hot path runs while it is of the sources that are there, and nothing depends on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import service

ROOT = Path(__file__).parent.parent
BARE = {name: value for name, value in os.environ.items() if name != "INFERPOOL_COMPILED"}
WHICH = "import service, service.pool.queue as queue; print(service.HOT_PATH, queue.__file__)"


def state_of(repository: Path, **environ: str) -> tuple[str, str]:
    """How the hot path of a copy runs, and of which kind of file its queue is."""
    run = subprocess.run(
        [sys.executable, "-c", WHICH],
        cwd=repository,
        env={**BARE, "PYTHONPATH": str(repository), **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    state, file = run.stdout.strip().rsplit(" ", 1)
    assert Path(file).is_relative_to(repository)
    return state, Path(file).suffix


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package as it was installed, with the hot path if it was compiled."""
    shutil.copytree(ROOT / "service", tmp_path / "service", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def compiled(copy: Path) -> Path:
    if not (ROOT / "service" / "_compiled").exists():
        assert "CI" not in os.environ, "CI has a compiler"
        pytest.skip("the project was installed without a C compiler, or with INFERPOOL_COMPILED=0")
    state = state_of(copy)
    if state[0] == "out of date" and "CI" not in os.environ:
        pytest.skip(
            "the sources have changed since the hot path was compiled: scripts/serve compiles it anew"
        )
    assert state == ("compiled", ".so")
    return copy


def test_ci_tests_what_is_compiled() -> None:
    """What users get is what is tested; some of it is tested interpreted besides."""
    if "CI" in os.environ and os.environ.get("INFERPOOL_COMPILED") != "0":
        assert service.HOT_PATH == "compiled"


def test_a_changed_line_runs_at_once(compiled: Path) -> None:
    """Also of a module that is not compiled: the C may have been made by what it says."""
    errors = compiled / "service" / "errors.py"
    before = errors.read_text()
    errors.write_text(before + "\n")
    assert state_of(compiled) == ("out of date", ".py")
    errors.write_text(before)
    assert state_of(compiled) == ("compiled", ".so")
    (compiled / "service" / "another.py").touch()
    assert state_of(compiled) == ("out of date", ".py")


def test_the_lock_of_an_editor_is_no_source(compiled: Path) -> None:
    (compiled / "service" / ".#errors.py").symlink_to("somebody@somewhere.1:2")
    assert state_of(compiled) == ("compiled", ".so")


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF"])
def test_it_can_be_switched_off(compiled: Path, value: str) -> None:
    assert state_of(compiled, INFERPOOL_COMPILED=value) == ("switched off", ".py")


def test_without_it_everything_runs_interpreted(copy: Path) -> None:
    shutil.rmtree(copy / "service" / "_compiled", ignore_errors=True)
    assert state_of(copy) == ("interpreted", ".py")


@pytest.fixture(scope="module")
def build_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip gets itself to build the package with."""
    tools = tmp_path_factory.mktemp("tools")
    system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", tools, *system["requires"]], check=True)
    return tools


class TestBuild:
    """What an installation makes of it."""

    def build(self, copy: Path, tools: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=copy,
            env={**BARE, "PYTHONPATH": str(tools), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def test_it_is_compiled_anew_of_other_sources(self, copy: Path, build_tools: Path) -> None:
        (copy / "service" / "another.py").touch()
        # Two modules are enough to see it, and are compiled in half of the time.
        setup = (copy / "setup.py").read_text()
        few = 'HOT_PATH = ["service/pool/line.py", "service/pool/queue.py"]\nROOT = Path(__file__)'
        (copy / "setup.py").write_text(setup.replace("ROOT = Path(__file__)", few))
        built = self.build(copy, build_tools, INFERPOOL_COMPILED="1")
        assert built.returncode == 0, built.stdout
        assert state_of(copy) == ("compiled", ".so")
        seal = (copy / "service" / "_compiled" / "sources").stat().st_mtime_ns
        assert self.build(copy, build_tools).returncode == 0
        assert (copy / "service" / "_compiled" / "sources").stat().st_mtime_ns == seal, "made only once"

    def test_without_a_compiler_it_is_left_out(self, copy: Path, build_tools: Path) -> None:
        shutil.rmtree(copy / "service" / "_compiled", ignore_errors=True)
        built = self.build(copy, build_tools, CC="false")
        assert built.returncode == 0, built.stdout
        assert "the hot path is not compiled, and will run interpreted" in built.stdout
        assert state_of(copy) == ("interpreted", ".py")
        assert self.build(copy, build_tools, CC="false", INFERPOOL_COMPILED="1").returncode != 0

    def test_it_can_be_left_out(self, copy: Path, build_tools: Path) -> None:
        assert self.build(copy, build_tools, INFERPOOL_COMPILED="0").returncode == 0
        assert state_of(copy) == ("interpreted", ".py")
