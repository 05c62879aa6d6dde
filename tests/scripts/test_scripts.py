"""The scripts install what is missing, and only once; Python, pip and uv are stand-ins that take notes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"])
COMMANDS = [script.name for script in SCRIPTS if script.parent.name == "scripts" and script.name[0] != "_"]
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists()
RUNTIME = "gpu" if HAS_DRIVER else "cpu"

# Answers the scripts as `python3` does, and writes the commands of pip to $NOTES.
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-V ") echo Python 3.11.99 ;;
  "-c import ensurepip") [[ -z "${NO_ENSUREPIP:-}" ]] ;;
  "-c import sys; print"*) echo python3.11-venv ;;
  "-c import sys; sys.exit"*) [[ -z "${TOO_OLD:-}" ]] ;;
  "-c import sysconfig"*) echo "${HEADERS:-}" ;;
  "-c import sys, tomllib"*) echo "setuptools>=77" ;;
  "-m venv")
    venv="${@: -1}"
    mkdir -p "$venv/bin"
    cp "$0" "$venv/bin/python"
    [[ "$*" == *--without-pip* ]] || touch "$venv/has-pip"
    echo "make ${venv##*/}" >>"$NOTES" ;;
  "-m ensurepip") touch "$(dirname "$0")/../has-pip"; echo "ensurepip" >>"$NOTES" ;;
  "-m pip")
    case "$3" in
      --version) [[ -e "$(dirname "$0")/../has-pip" ]] ;;
      --python)
        echo "pip $5 ${*: -1}" >>"$NOTES"
        [[ -z "${NO_PIP:-}" ]] && install -m 755 "$STAND_IN_UV" "$(dirname "$4")/uv" ;;
      config) [[ -z "${PIP_INDEX:-}" ]] || echo "global.index-url='$PIP_INDEX'"
        [[ -z "${PIP_LINKS:-}" ]] || echo "global.find-links='$PIP_LINKS'" ;;
      show) [[ "$5" == "${INSTALLED:-}" ]] ;;
      *)
        echo "pip $3 ${*: -1}" >>"$NOTES"
        [[ "${*: -1}" != uv ]] || install -m 755 "$STAND_IN_UV" "$(dirname "$0")/uv"
        [[ -z "${PIP_BREAKS:-}" ]] ;;
    esac ;;
  "-m zipfile") cat "$4" ;;
  "-m benchmarks."*) printf '%s\\n' "$PWD" "${@:2}" ;;
  "-m coverage") printf '%s\\n' "${*:3}"; [[ "$*" != *"/${UNCOVERED:-none}/"* ]] || exit 2 ;;
  "-m pytest") printf '%s\\n' "$PWD" "${@:3}" ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""

# Answers as `uv` does: a wheel is a file with the name of one of its modules.
UV = """#!/bin/bash
[[ "$1" != --quiet ]] || shift
case "$1 $2" in
  "venv --clear") mkdir -p "$5/bin"; touch "$5/bin/python" ;;
  "pip uninstall") echo "uv uninstall ${*: -1}" >>"$NOTES" ;;
  "pip install")
    extras=""
    while [[ $# -gt 0 ]]; do if [[ "$1" == --extra ]]; then extras+="[$2]"; fi; last="$1"; shift; done
    case "$last" in
      -) cat >/dev/null; echo "uv install tools" >>"$NOTES" ;;
      .\\[*)
        echo "uv install $last${UV_FIND_LINKS:+ links $UV_FIND_LINKS}" >>"$NOTES"
        [[ -z "${UV_BREAKS:-}" ]] ;;
      *.whl)
        echo "uv install wheel" >>"$NOTES"
        bin="$VENV_FOLDER/bin"
        printf '#!/bin/sh\\nprintf "%%s\\\\n" "$@"\\n' >"$bin/inferpool"
        chmod +x "$bin/inferpool" ;;
      *)
        echo "uv install $extras${UV_DEFAULT_INDEX:+ from $UV_DEFAULT_INDEX}" >>"$NOTES"
        touch "$VENV_FOLDER/has-pip"
        [[ -z "${UV_BREAKS:-}" ]] ;;
    esac ;;
  "build --wheel")
    echo "uv build compiled=${INFERPOOL_COMPILED:-}" >>"$NOTES"
    mkdir -p "$7"
    [[ "${INFERPOOL_COMPILED:-}" == 0 || -n "${NOT_COMPILED:-}" ]] || name=inferpool__mypyc
    echo "${name:-}" >"$7/inferpool.whl"
    [[ -z "${BUILD_BREAKS:-}" ]] ;;
  *) echo "unexpected: uv $*" >&2; exit 99 ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder of its own, with stand-ins for the commands that they call."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "a check out"
        self.bin = folder / "bin"
        self.notes = folder / "notes"
        self.headers = folder / "include"
        shutil.copytree(ROOT / "scripts", self.repo / "scripts")
        (self.repo / "pyproject.toml").write_text("[project]\n")
        for name in ("setup.py", "README.md", "LICENSE"):
            (self.repo / name).touch()
        (self.repo / "service" / "inferpool").mkdir(parents=True)
        (self.repo / "service" / "inferpool" / "_numbers.c").touch()
        self.bin.mkdir()
        self.headers.mkdir()
        (self.headers / "Python.h").touch()
        for name in ("python3.13", "python3.12", "python3.11", "python3"):
            self.stand_in(name, PYTHON)
        self.stand_in("cc", "#!/bin/sh\nexit 99\n")
        self.stand_in("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.uv = folder / "uv"
        self.uv.write_text(UV)
        self.uv.chmod(0o755)

    def stand_in(self, name: str, text: str) -> None:
        """Put a command before those of the machine."""
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)

    def run(self, name: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a script, from another folder than its own."""
        own = {
            "PATH": f"{self.bin}:/usr/bin:/bin", "NOTES": str(self.notes), "HEADERS": str(self.headers),
            "STAND_IN_UV": str(self.uv), "VENV_FOLDER": str(self.repo / ".venv"), "CI": "",
        }  # fmt: skip
        inherited = {
            key: text for key, text in os.environ.items() if not key.startswith(("PIP_", "UV_", "INFERPOOL_"))
        }
        return subprocess.run(
            [self.repo / "scripts" / name, *arguments],
            cwd=self.bin,
            env={**inherited, **own, **environ},
            capture_output=True,
            text=True,
            check=False,
        )

    def noted(self) -> list[str]:
        """Return the installations since the last call."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


BUILD = ["uv install tools", "uv build compiled=", "uv install wheel"]
"""The notes when the wheel is built for the first time."""
FIRST_START = ["make .venv", "pip install uv", f"uv install [{RUNTIME}][text]", *BUILD]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_the_script(script: Path) -> None:
    """Every script is bash without a syntax error, and can be run unless it is to be sourced."""
    run = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert os.access(script, os.X_OK) is not script.name.startswith("_")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_explains_the_script_and_does_nothing(checkout: Checkout, name: str, flag: str) -> None:
    run = checkout.run(name, flag)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"scripts/{name}" in run.stdout
    assert "#" not in run.stdout
    assert len(run.stdout.splitlines()) >= 3
    assert checkout.noted() == []
    assert not (checkout.repo / ".venv").exists()


def test_serve_passes_its_arguments_on(checkout: Checkout) -> None:
    """`scripts/serve --port 9000` is `inferpool serve …/models --port 9000`, also in a folder with spaces."""
    run = checkout.run("serve", "--port", "9000", "two words")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["serve", f"{checkout.repo}/models", "--port", "9000", "two words"]


def test_a_second_start_installs_nothing(checkout: Checkout) -> None:
    """The first start makes the environment, installs uv and the packages, and builds the wheel."""
    run = checkout.run("serve")
    assert sorted(checkout.noted()) == sorted(FIRST_START)
    for progress in (
        "Installing the packages",
        "Compiling the server's hot path",
        "Everything is installed after",
    ):
        assert progress in run.stderr
    run = checkout.run("serve")
    assert (run.returncode, run.stderr) == (0, "")
    assert checkout.noted() == []


def test_uv_on_the_path_is_used(checkout: Checkout) -> None:
    checkout.stand_in("uv", UV)
    checkout.run("serve")
    assert "pip install uv" not in checkout.noted()


def test_uv_is_installed_where_pip_is_missing_or_old(checkout: Checkout) -> None:
    run = checkout.run("serve", NO_PIP="yes")
    assert run.returncode == 0, run.stderr
    assert checkout.noted()[:4] == ["make .venv", "pip install uv", "ensurepip", "pip install uv"]


def test_uv_uses_the_package_index_of_pip(checkout: Checkout) -> None:
    checkout.run("serve", PIP_INDEX="https://pip.example.org/simple")
    assert f"uv install [{RUNTIME}][text] from https://pip.example.org/simple" in checkout.noted()


def test_changed_sources_are_built_again(checkout: Checkout) -> None:
    """After `git pull`, for example. The packages stay as they are."""
    checkout.run("serve")
    checkout.noted()
    (checkout.repo / "service" / "inferpool" / "new.py").touch()
    run = checkout.run("serve")
    assert (run.returncode, checkout.noted()) == (0, ["uv build compiled=", "uv install wheel"])


def test_a_build_without_compiling_is_another_wheel(checkout: Checkout) -> None:
    checkout.run("serve")
    checkout.noted()
    run = checkout.run("serve", INFERPOOL_COMPILED="0")
    assert checkout.noted() == ["uv build compiled=0", "uv install wheel"]
    assert "without compiling" in run.stderr


def test_without_a_compiler_the_server_runs_interpreted(checkout: Checkout) -> None:
    """The script warns, says what to install, and serves; with a compiler the next start compiles."""
    run = checkout.run("serve", HEADERS="/nowhere")
    assert run.returncode == 0, run.stderr
    assert "Warning: no C compiler" in run.stderr
    assert "apt-get install gcc libc6-dev python3-dev" in run.stderr
    assert "uv build compiled=0" in checkout.noted()
    assert checkout.run("serve", HEADERS="/nowhere").stderr == ""
    checkout.run("serve")
    assert checkout.noted() == ["uv build compiled=", "uv install wheel"]
    assert checkout.run("serve", HEADERS="/nowhere", INFERPOOL_COMPILED="1").returncode == 1


def test_a_failed_compilation_is_a_warning(checkout: Checkout) -> None:
    run = checkout.run("serve", NOT_COMPILED="yes")
    assert run.returncode == 0
    assert "Warning: the hot path could not be compiled" in run.stderr


def test_tests_have_an_environment_of_their_own(checkout: Checkout) -> None:
    """`scripts/test` installs the sources, editable; the environment of serve stays as it is."""
    checkout.run("serve")
    checkout.noted()
    run = checkout.run("test", "-k", "npy")
    assert run.stdout.splitlines() == [str(checkout.repo), "-k", "npy"]
    assert checkout.noted() == ["make .venv-test", "pip install uv", f"uv install .[{RUNTIME},test]"]
    checkout.run("test", "-k", "npy")
    checkout.run("serve")
    assert checkout.noted() == []
    checkout.run("check")
    assert checkout.noted() == ["pip install inferpool[check]"]


def test_all_tests_run_on_several_processes(checkout: Checkout) -> None:
    run = checkout.run("test", "--full")
    assert run.stdout.splitlines()[1:3] == ["--numprocesses", str(len(os.sched_getaffinity(0)) + 1)]


@pytest.mark.parametrize("part", ["pool", "wire", "predict"])
def test_the_coverage_of_each_part_of_the_hot_path_is_reported_and_must_hold(
    checkout: Checkout, part: str
) -> None:
    assert checkout.run("test").returncode == 0
    run = checkout.run("test", UNCOVERED=part)
    assert run.returncode == 2
    assert [line for line in run.stdout.splitlines() if line.startswith("report")] == [
        f"report --include=service/inferpool/{each}/*" for each in ("pool", "wire", "http/predict")
    ]


def test_tests_say_at_their_start_which_programs_are_missing(checkout: Checkout) -> None:
    """The script names each missing program, the tests that need it and its package; in CI it stops."""
    checkout.stand_in("id", "#!/bin/sh\necho 1000\n")
    only = {
        name: shutil.which(name)
        for name in ("bash", "cat", "cp", "dirname", "find", "mkdir", "nproc", "rm", "sed")
    }
    only |= {name: shutil.which(name) for name in ("sha256sum", "touch")}
    for name, file in only.items():
        (checkout.bin / name).symlink_to(str(file))
    run = checkout.run("test", "tests/wire", PATH=str(checkout.bin))
    assert run.returncode == 0, run.stderr
    for name in (
        "chromium",
        "podman",
        "prometheus",
        "haproxy",
        "wrk",
        "kustomize",
        "runc",
        "mmdebstrap",
        "curl",
        "root",
    ):
        assert f"  {name} " in run.stderr
    assert "apt-get install haproxy" in run.stderr
    assert "  cc " not in run.stderr
    checkout.noted()
    run = checkout.run("test", PATH=str(checkout.bin), CI="true")
    assert (run.returncode, run.stdout, checkout.noted()) == (1, "", [])


def test_a_changed_project_is_installed_again(checkout: Checkout) -> None:
    """A change of pyproject.toml counts: it may be a new dependency or a new version."""
    checkout.run("serve")
    checkout.run("test", "-k", "npy")
    checkout.noted()
    (checkout.repo / "pyproject.toml").write_text("[project]\nversion = '2'\n")
    checkout.run("serve")
    checkout.run("test", "-k", "npy")
    notes = [*FIRST_START[2:], f"uv install .[{RUNTIME},test]"]
    assert sorted(checkout.noted()) == sorted(note for note in notes if note != "uv install tools")


def test_a_moved_checkout_is_installed_again(checkout: Checkout) -> None:
    """Commands in `.venv/bin` hold the folder that they were installed in."""
    checkout.run("serve")
    checkout.noted()
    checkout.repo = checkout.repo.rename(checkout.repo.with_name("moved"))
    assert checkout.run("serve", VENV_FOLDER=str(checkout.repo / ".venv")).returncode == 0
    assert sorted(checkout.noted()) == sorted([f"uv install [{RUNTIME}][text]", *BUILD])


@pytest.mark.parametrize("fault", ["UV_BREAKS", "BUILD_BREAKS"])
def test_a_failed_installation_is_tried_again(checkout: Checkout, fault: str) -> None:
    """If uv fails the script fails, and does not serve a half of the installation."""
    run = checkout.run("serve", **{fault: "yes"})
    assert run.returncode != 0
    assert run.stdout == ""
    checkout.noted()
    assert checkout.run("serve").returncode == 0
    assert "uv install wheel" in checkout.noted()


def test_a_failed_installation_of_the_tests_is_tried_again(checkout: Checkout) -> None:
    assert checkout.run("test", "-k", "npy", UV_BREAKS="yes", PIP_BREAKS="yes").returncode != 0
    checkout.noted()
    assert checkout.run("test", "-k", "npy").returncode == 0
    assert checkout.noted() == [f"uv install .[{RUNTIME},test]"]


def test_pip_installs_the_tests_if_uv_cannot(checkout: Checkout) -> None:
    """A package may be on an index that only pip asks."""
    assert checkout.run("test", "-k", "npy", UV_BREAKS="yes").returncode == 0
    attempts = [f"uv install .[{RUNTIME},test]", f"pip install .[{RUNTIME},test]"]
    assert checkout.noted() == ["make .venv-test", "pip install uv", *attempts]


def test_uv_finds_the_local_builds_that_pip_would_find(checkout: Checkout) -> None:
    """Otherwise it would download PyTorch with gigabytes of CUDA libraries."""
    checkout.run("test", "-k", "npy", PIP_LINKS="/some/wheels")
    assert f"uv install .[{RUNTIME},test] links /some/wheels" in checkout.noted()


def test_with_a_driver_the_gpu_extra_is_installed(checkout: Checkout) -> None:
    """If nvidia-smi works, the server gets ONNX Runtime for GPUs."""
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout.run("serve")
    assert "uv install [gpu][text]" in checkout.noted()


def test_the_two_runtimes_are_never_both_installed(checkout: Checkout) -> None:
    """The other build is removed first, with the files that it overwrote."""
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout.run("test", "-k", "npy", INSTALLED="onnxruntime")
    assert checkout.noted() == [
        *("make .venv-test", "pip uninstall onnxruntime-gpu"),
        *("pip install uv", "uv install .[gpu,test]"),
    ]


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a driver, which cannot be hidden")
def test_a_machine_without_its_driver_goes_back_to_the_cpu(checkout: Checkout) -> None:
    """Every start chooses the runtime again."""
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout.run("serve")
    checkout.stand_in("nvidia-smi", "#!/bin/sh\nexit 9\n")
    checkout.noted()
    checkout.run("serve")
    assert checkout.noted() == ["uv uninstall onnxruntime-gpu", "uv install [cpu][text]"]


def test_a_user_is_told_which_package_is_missing(checkout: Checkout) -> None:
    """Without ensurepip, and without the right to install it, the script says what to run."""
    checkout.stand_in("id", "#!/bin/sh\necho 1000\n")
    checkout.stand_in("apt-get", "#!/bin/sh\nexit 99\n")
    run = checkout.run("check", NO_ENSUREPIP="yes")
    assert (run.returncode, run.stdout) == (1, "")
    assert "sudo apt-get install -y python3.11-venv" in run.stderr
    assert checkout.noted() == []


def test_root_gets_the_package_installed(checkout: Checkout) -> None:
    """As root the script installs the package, says so, and goes on."""
    checkout.stand_in("id", "#!/bin/sh\necho 0\n")
    checkout.stand_in("apt-get", '#!/bin/sh\necho "apt-get $*" >>"$NOTES"\n')
    run = checkout.run("test", "-k", "npy", NO_ENSUREPIP="yes")
    assert run.returncode == 0
    assert "python3.11-venv" in run.stderr
    assert checkout.noted()[:2] == ["apt-get install -y -qq python3.11-venv", "make .venv-test"]


def test_an_old_python_is_not_enough(checkout: Checkout) -> None:
    """If every Python is older than 3.11 the script says which one it needs."""
    run = checkout.run("serve", TOO_OLD="yes")
    assert (run.returncode, run.stdout) == (1, "")
    assert "Python 3.11 or later" in run.stderr


def test_bench_lists_the_benchmarks(checkout: Checkout) -> None:
    """Without a name it lists the benchmarks; it refuses an unknown name; both install nothing."""
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


def test_bench_runs_files_and_folders_with_the_compiled_server(checkout: Checkout) -> None:
    """`scripts/bench NAME` runs a module of benchmarks/, a file or a folder, in the project's folder."""
    (checkout.repo / "benchmarks" / "pairs").mkdir(parents=True)
    for name in ("wire.py", "pairs/__main__.py"):
        (checkout.repo / "benchmarks" / name).touch()
    for name in ("wire", "pairs"):
        run = checkout.run("bench", name, "--rounds", "two words")
        assert run.stdout.splitlines() == [str(checkout.repo), f"benchmarks.{name}", "--rounds", "two words"]
    assert sorted(checkout.noted()) == sorted([*FIRST_START, "pip install inferpool[test]"])
