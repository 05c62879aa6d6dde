"""The scripts install what is missing, once, and only that; pip and Python are stand-ins that take notes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"])
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists()

# Answers as `python3` does where the scripts ask it something; what pip is told goes to $NOTES.
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-V ") echo Python 3.11.99 ;;
  "-c import ensurepip") [[ -z "${NO_ENSUREPIP:-}" ]] ;;
  "-c import sys; print"*) echo python3.11-venv ;;
  "-c import sys; sys.exit"*) [[ -z "${TOO_OLD:-}" ]] ;;
  "-m venv")
    venv="${@: -1}"
    mkdir -p "$venv/bin"
    cp "$0" "$venv/bin/python"
    echo "venv" >>"$NOTES"
    printf '#!/bin/sh\\nprintf "%%s\\n" "$@"\\n' >"$venv/bin/inferpool"
    chmod +x "$venv/bin/inferpool" ;;
  "-m pip")
    case "$3" in
      --version) ;;
      show) [[ "$5" == "${INSTALLED:-}" ]] ;;
      *) echo "$3 ${*: -1}" >>"$NOTES"; [[ -z "${PIP_BREAKS:-}" ]] ;;
    esac ;;
  "-c import inferpool; "*) echo "${HOT_PATH:-compiled}" ;;
  "-m benchmarks."*) printf '%s\\n' "$PWD" "${@:2}" ;;
  "-m pytest") printf '%s\\n' "$PWD" "${@:3}" ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder of its own, with stand-ins for what they call."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "a check out"
        self.bin = folder / "bin"
        self.notes = folder / "notes"
        shutil.copytree(ROOT / "scripts", self.repo / "scripts")
        (self.repo / "pyproject.toml").write_text("[project]\n")
        (self.repo / "setup.py").touch()
        (self.repo / "service" / "wire").mkdir(parents=True)
        (self.repo / "service" / "wire" / "_numbers.c").touch()
        self.bin.mkdir()
        for name in ("python3.13", "python3.12", "python3.11", "python3"):
            self.stand_in(name, PYTHON)
        self.stand_in("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def stand_in(self, name: str, text: str) -> None:
        """Put a command before those of the machine."""
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)

    def run(self, name: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a script, from another folder than its own."""
        own = {"PATH": f"{self.bin}:{os.environ['PATH']}", "NOTES": str(self.notes)}
        return subprocess.run(
            [self.repo / "scripts" / name, *arguments],
            cwd=self.bin,
            env={**os.environ, **own, **environ},
            capture_output=True,
            text=True,
            check=False,
        )

    def noted(self) -> list[str]:
        """What was made and what pip was told since the last call."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


RUNTIME = "gpu" if HAS_DRIVER else "cpu"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_it(script: Path):
    """Every script is bash without a syntax error, and can be run unless it is to be sourced."""
    run = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert os.access(script, os.X_OK) is not script.name.startswith("_")


def test_serve_passes_its_arguments_on(checkout: Checkout):
    """`scripts/serve --port 9000` is `inferpool serve …/models --port 9000`, also where paths have spaces."""
    run = checkout.run("serve", "--port", "9000", "two words")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["serve", f"{checkout.repo}/models", "--port", "9000", "two words"]


def test_a_second_start_installs_nothing(checkout: Checkout):
    """The first start makes the environment and installs two extras; the next does neither."""
    checkout.run("serve")
    assert checkout.noted() == ["venv", f"install .[{RUNTIME},text]"]
    run = checkout.run("serve")
    assert (run.returncode, run.stderr) == (0, "")
    assert checkout.noted() == []


def test_tests_need_what_serve_needs_and_more(checkout: Checkout):
    """`scripts/test` adds what is missing, runs pytest in the project's folder, and spares serve's."""
    checkout.run("serve")
    checkout.noted()
    run = checkout.run("test", "-k", "npy")
    assert run.stdout.splitlines() == [str(checkout.repo), "-k", "npy"]
    assert checkout.noted() == ["install .[test]"]
    checkout.run("serve")
    assert checkout.noted() == []


def test_a_changed_project_is_installed_again(checkout: Checkout):
    """A change of pyproject.toml counts, be it a new dependency or a new version."""
    checkout.run("serve")
    checkout.noted()
    (checkout.repo / "pyproject.toml").write_text("[project]\nversion = '2'\n")
    checkout.run("serve")
    assert checkout.noted() == [f"install .[{RUNTIME},text]"]


@pytest.mark.parametrize("script", ["serve", "bench wire"])
def test_a_hot_path_that_was_compiled_of_other_sources_is_compiled_again(checkout: Checkout, script: str):
    """After `git pull`, say; where there was no compiler nothing is tried at each start."""
    (checkout.repo / "benchmarks").mkdir()
    (checkout.repo / "benchmarks" / "wire.py").touch()
    checkout.run(*script.split())
    checkout.noted()
    run = checkout.run(*script.split(), HOT_PATH="out of date")
    assert (run.returncode, checkout.noted()) == (0, ["install ."])
    assert run.stderr.startswith("Compiling the hot path anew")
    for state in ("interpreted", "switched off"):
        checkout.run(*script.split(), HOT_PATH=state)
        assert checkout.noted() == []


def test_a_moved_checkout_is_installed_again(checkout: Checkout):
    """Commands in `.venv/bin` hold the folder they were installed in."""
    checkout.run("serve")
    checkout.noted()
    checkout.repo = checkout.repo.rename(checkout.repo.with_name("moved"))
    assert checkout.run("serve").returncode == 0
    assert checkout.noted() == [f"install .[{RUNTIME},text]"]


def test_an_installation_that_broke_off_is_tried_again(checkout: Checkout):
    """Where pip fails the script fails, and serves nothing that is half there."""
    run = checkout.run("serve", PIP_BREAKS="yes")
    assert run.returncode != 0
    assert run.stdout == ""
    checkout.noted()
    assert checkout.run("serve").returncode == 0
    assert checkout.noted() == [f"install .[{RUNTIME},text]"]


def test_a_driver_means_the_gpu_extra(checkout: Checkout):
    """Where nvidia-smi works it is ONNX Runtime for GPUs."""
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout.run("serve")
    assert checkout.noted() == ["venv", "install .[gpu,text]"]


def test_the_two_runtimes_are_never_both_installed(checkout: Checkout):
    """The other build is taken away first, and with it what it overwrote."""
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout.run("serve", INSTALLED="onnxruntime")
    assert checkout.noted() == ["venv", "uninstall onnxruntime-gpu", "install .[gpu,text]"]


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a driver, which cannot be hidden")
def test_a_machine_that_lost_its_driver_goes_back_to_the_cpu(checkout: Checkout):
    """The choice is made at every start, not once."""
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout.run("serve")
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 9\n")
    checkout.noted()
    checkout.run("serve", INSTALLED="onnxruntime-gpu")
    assert checkout.noted() == ["uninstall onnxruntime-gpu", "install .[cpu]"]


def test_a_user_is_told_which_package_is_missing(checkout: Checkout):
    """Without ensurepip, and without the right to install it, the script says what to run."""
    checkout.stand_in("id", "#!/bin/sh\necho 1000\n")
    checkout.stand_in("apt-get", "#!/bin/sh\nexit 99\n")
    run = checkout.run("serve", NO_ENSUREPIP="yes")
    assert (run.returncode, run.stdout) == (1, "")
    assert "sudo apt-get install -y python3.11-venv" in run.stderr
    assert checkout.noted() == []


def test_root_gets_the_package_installed(checkout: Checkout):
    """As root the script installs it, says so, and goes on."""
    checkout.stand_in("id", "#!/bin/sh\necho 0\n")
    checkout.stand_in("apt-get", '#!/bin/sh\necho "apt-get $*" >>"$NOTES"\n')
    run = checkout.run("serve", NO_ENSUREPIP="yes")
    assert run.returncode == 0
    assert "python3.11-venv" in run.stderr
    assert checkout.noted()[:2] == ["apt-get install -y -qq python3.11-venv", "venv"]


def test_an_old_python_is_not_enough(checkout: Checkout):
    """Where every Python is older than 3.11 the script says what it needs."""
    run = checkout.run("serve", TOO_OLD="yes")
    assert (run.returncode, run.stdout) == (1, "")
    assert "Python 3.11 or later" in run.stderr


def test_bench_lists_what_there_is(checkout: Checkout):
    """Without a name it lists the benchmarks, with an unknown one it says so, and installs nothing."""
    (checkout.repo / "benchmarks").mkdir()
    for name in ("pairs", "results"):
        (checkout.repo / "benchmarks" / name).mkdir()
    for name in ("wire.py", "gather.py", "_shared.py", "notes.md", "pairs/__main__.py", "pairs/load.py"):
        (checkout.repo / "benchmarks" / name).touch()
    assert checkout.run("bench").stdout.split() == ["gather", "pairs", "wire"]
    run = checkout.run("bench", "nothing")
    assert run.returncode == 1
    assert '"nothing"' in run.stderr
    assert checkout.noted() == []


def test_bench_runs_files_and_folders(checkout: Checkout):
    """`scripts/bench NAME` runs a module of benchmarks/, a file or a folder, in the project's folder."""
    (checkout.repo / "benchmarks" / "pairs").mkdir(parents=True)
    for name in ("wire.py", "pairs/__main__.py"):
        (checkout.repo / "benchmarks" / name).touch()
    for name in ("wire", "pairs"):
        run = checkout.run("bench", name, "--rounds", "two words")
        assert run.stdout.splitlines() == [str(checkout.repo), f"benchmarks.{name}", "--rounds", "two words"]
