"""The benchmark of a Deployment: its clients run here, against a real server, and each failure is counted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import rolling_deployment
from tests.server import Server

KUBECTL = """\
#!{python}
# A cluster with one pod, whose Service leads to a server on this machine. A pod that is created runs here.
import json, os, pathlib, signal, subprocess, sys

pod = pathlib.Path(__file__).with_name("pod.json")
words = [word for word in sys.argv[1:] if not word.startswith("--")]
if "--namespace" in sys.argv:
    del words[0]
match words:
    case ["get", "deployment", _]:
        template = {{"spec": {{"containers": [{{"name": "inferpool", "image": "inferpool:cpu"}}]}}}}
        spec = {{"selector": {{"matchLabels": {{"a": "b"}}}}, "template": template}}
        print(json.dumps({{"spec": spec}}))
    case ["get", "service", _]:
        print(json.dumps({{"spec": {{"clusterIP": "127.0.0.1", "ports": [{{"port": {port}}}]}}}}))
    case ["get", "pods", "a=b"]:
        print(json.dumps({{"items": [{{"metadata": {{"name": "one"}}}}]}}))
    case ["create"]:
        pod.write_text(sys.stdin.read())
    case ["logs", _]:
        [container] = json.loads(pod.read_text())["spec"]["containers"]
        environ = {{variable["name"]: variable["value"] for variable in container["env"]}}
        pod.with_name("pid").write_text(str(os.getpid()))
        os.execve(sys.executable, [sys.executable, *container["command"][1:]], environ)
    case ["delete", "pod", _]:
        if pod.exists():
            os.kill(int(pod.with_name("pid").read_text()), signal.SIGKILL)
            pod.unlink()
    case ["rollout" | "wait", *_]:
        pass
    case _:
        sys.exit(f"unknown: {{words}}")
"""


@pytest.fixture
def cluster(bundled: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a `kubectl`; the load before and after the change is short."""
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL.format(python=sys.executable, port=bundled.port))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(rolling_deployment, "LINES_BEFORE", 1)
    monkeypatch.setattr(rolling_deployment, "LINES_AFTER", 1)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "told"),
    [("/predict/digits", " 0 failed"), ("/predict/absent", "× 404 ")],
    ids=["answered", "refused"],
)
def test_each_failure_counts(
    cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["rolling_deployment.py", "--path", path, "--rate", "200"])
    with pytest.raises(SystemExit) as ended:
        rolling_deployment.main()
    printed = capsys.readouterr().out
    assert told in printed
    assert ended.value.code == (path != "/predict/digits")
    assert not (cluster / "pod.json").exists()
