"""Forked servers behave as those of a new interpreter do, and cost less CPU time."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ENGINES, MakeChaos
from tests.server import Server

NAMES = {
    "in-process": ["inferpool"],
    "process": ["inferpool.engine.supervisor", "inferpool.web_process", "inferpool.engine_process"],
}


def start(repository: Path, folder: Path, *flags: str, engine: str, fork: bool = True) -> Server:
    own = {"INFERPOOL_CACHE_DIR": str(folder), "INFERPOOL_MEASURE_MS": "0", **ENGINES[engine]}
    return Server(repository, flags, own, fork=fork)


def cpu_s(server: Server) -> float:
    ticks = 0
    for pid in server.processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("engine", NAMES)
def test_a_fork_looks_answers_and_ends_as_a_server_does(
    make_chaos: MakeChaos, tmp_path: Path, engine: str
) -> None:
    repository = make_chaos("m")
    costs, shown = [], []
    for fork in (True, False):
        server = start(repository, tmp_path, engine=engine, fork=fork)
        try:
            server.wait_loaded()
            costs.append(cpu_s(server))
            commands = [
                Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
                for pid in server.processes()
            ]
            assert all(any(name in command for command in commands) for name in NAMES[engine])
            descriptors = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
            shown.append(([len(command) for command in commands], descriptors))
            assert server.process.poll() is None
            answer = server.post("/predict/m", json={"inputs": [[1.0, 2.0, 3.0, 4.0]]})
            assert answer.status_code == 200, answer.text
            assert server.stop() == 0
            assert server.process.poll() == 0
        finally:
            server.kill()
    assert shown[0] == shown[1]
    assert costs[0] < costs[1]


def test_the_status_of_a_fork_is_that_of_its_end(make_chaos: MakeChaos, tmp_path: Path) -> None:
    server = start(make_chaos("m"), tmp_path, engine="in-process")
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(0.01)
    server.process.kill()
    assert server.process.wait() == -signal.SIGKILL
    server.kill()
    with pytest.raises(AssertionError, match="no log line matches"):
        start(tmp_path / "missing", tmp_path, engine="in-process")
