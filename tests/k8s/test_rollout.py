"""`k8s/rollout.sh` rolls a version out over several servers, and back in all of them if it fails in one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, Serve
from tests.onnx_models import write_shift
from tests.server import Server

KUBECTL = """\
#!/bin/sh
# Two pods, which are processes of this machine; the socket of each lies in a folder named after the pod.
shift 2
case $1 in
get) echo $PODS ;;
exec)
  [ "$3 $4 $5" = "--container inferpool --" ] || exit 2
  pod=${2#pod/}; shift 5
  program=$1; shift
  for word; do
    shift
    case $word in unix:*) word=unix:$SOCKETS/$pod/admin.sock ;; esac
    set -- "$@" "$word"
  done
  exec "$PYTHON" -m "$program" "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good` does the same in both versions; the second version of `faulty` fails for the number 7."""
    made = tmp_path_factory.mktemp("rollout")
    for version in (1, 2):
        write_shift(made, "good", version, 1.0)
        (made / "faulty" / str(version)).mkdir(parents=True)
        fault = ', "raises_at": 7' if version == 2 else ""
        (made / "faulty" / str(version) / "model.chaos").write_text(f'{{"row": [2]{fault}}}')
    return made


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sockets, and of `kubectl`."""
    made = tmp_path_factory.mktemp("sockets")
    program = made / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def pods(folder: Path, sockets: Path, module_serve: Serve) -> list[Server]:
    started = []
    for name in ("one", "two"):
        (sockets / name).mkdir()
        flags = ("--engine", "in-process", "--admin-socket", str(sockets / name / "admin.sock"))
        started.append(module_serve(folder, *flags, INFERPOOL_MEASURE_MS="0"))
    return started


@pytest.fixture(autouse=True)
def clients(pods: list[Server]) -> Iterator[None]:
    """Clients of both servers, until the test has ended."""
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=30, verify=False) as client:
            while not over.wait(0.05):
                for server in pods:
                    for model in ("good", "faulty"):
                        client.post(f"{server.url}/predict/{model}", json={"inputs": [[7.0, 1.0]]})

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    over.set()
    thread.join()


def roll_out(sockets: Path, pods: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script for the pods of these names."""
    path = f"{sockets}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHON": sys.executable, "SOCKETS": str(sockets), "PODS": pods}
    command = [str(ROOT / "k8s" / "rollout.sh"), *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def versions(server: Server, model: str) -> set[str]:
    """The versions that answer requests which name none; errors count as theirs."""
    answers = [server.post(f"/predict/{model}", json={"inputs": [[7.0, 1.0]]}).json() for _ in range(8)]
    return {str(answer.get("version", answer.get("code"))) for answer in answers}


def test_a_version_that_fails_in_a_pod_answers_in_none(pods: list[Server], sockets: Path) -> None:
    done = roll_out(sockets, "pod/one pod/two", "faulty", "1", "2", "50%", "100000")
    assert done.returncode == 1, done.stderr
    assert "faulty: version 1 answers again in all pods" in done.stderr
    for server in pods:
        assert server.get("/models/faulty").json()["labels"] == {"stable": 1}
        assert versions(server, "faulty") == {"1"}
    pods[0].wait_for("audit: roll back the canary faulty/2")


def test_a_version_without_a_fault_takes_the_label(pods: list[Server], sockets: Path) -> None:
    done = roll_out(sockets, "pod/two", "good", "1", "2", "50%", "20")
    assert done.returncode == 0, done.stderr
    assert "version 2 answers in all pods" in done.stderr
    assert versions(pods[1], "good") == {"2"}


def test_a_pod_that_cannot_be_rolled_back_is_named(tmp_path: Path) -> None:
    program = tmp_path / "kubectl"
    # The second pod cannot be reached any more once it is to load.
    program.write_text("""\
#!/bin/sh
case $* in
*" get pods "*) echo pod/one pod/two ;;
*" load "*) case $* in *pod/two*) touch "$SOCKETS/gone"; exit 1 ;; esac ;;
*pod/two*) [ ! -e "$SOCKETS/gone" ] ;;
esac
""")
    program.chmod(0o755)
    done = roll_out(tmp_path, "", "good", "1", "2")
    assert done.returncode == 1
    assert done.stderr.endswith("may still answer: pod/two\n")
    assert "in all pods" not in done.stderr
