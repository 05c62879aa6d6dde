"""A server that has one CPU and one gibibyte: by a cgroup, or without rights by ulimit and taskset."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from pathlib import Path

from tests.server import ROOT, Server

MEMORY_BYTES = 2**30
PERIOD_US = 100_000
_CGROUPS = Path("/sys/fs/cgroup")


class ConfinedServer(Server):
    """`inferpool serve`, as `python` has it installed, with one CPU and one gibibyte."""

    def __init__(self, repository: Path, cache_dir: Path, python: str = sys.executable) -> None:
        self._folders = _make_cgroup()
        files = [str(folder / "cgroup.procs") for folder in self._folders]
        enter = "".join(f"echo $$ >{file}; " for file in files)
        limit = "" if files else f"ulimit -d {MEMORY_BYTES // 1024}; "
        pin = "" if files else "taskset --cpu-list 0 "
        command = f'{enter}{limit}exec {pin}"$0" -m inferpool serve "$@"'
        environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_LOG_FORMAT": "json"}
        if not files:
            environ["INFERPOOL_MEMORY_BYTES"] = str(MEMORY_BYTES)
        self._start(["bash", "-c", command, python, str(repository), "--port", "0"], environ)

    @property
    def confined_by(self) -> str:
        """How the server is confined."""
        return "a cgroup" if self._folders else "ulimit and taskset"

    def peak_bytes(self) -> int:
        """Return the most memory that the server has held, without the cache of files."""
        return self.status_bytes("VmHWM")

    def kill(self) -> None:
        """End the server, and remove its cgroup."""
        super().kill()
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_cgroup() -> list[Path]:
    """Return the folders of a new cgroup with one CPU and one gibibyte; empty without the rights."""
    name = f"inferpool-{uuid.uuid4().hex[:8]}"
    made: list[Path] = []
    try:
        if (_CGROUPS / "cgroup.controllers").exists():
            folder = _CGROUPS / name
            folder.mkdir()
            made.append(folder)
            (folder / "memory.max").write_text(str(MEMORY_BYTES))
            (folder / "cpu.max").write_text(f"{PERIOD_US} {PERIOD_US}")
            return made
        limits = {
            "memory": {"memory.limit_in_bytes": MEMORY_BYTES},
            "cpu": {"cpu.cfs_period_us": PERIOD_US, "cpu.cfs_quota_us": PERIOD_US},
        }
        for controller, values in limits.items():
            folder = _CGROUPS / controller / name
            folder.mkdir()
            made.append(folder)
            for file, value in values.items():
                (folder / file).write_text(str(value))
        return made
    except OSError:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return []


def measure_apart(port: int, seconds: float) -> str:
    """Return what `tests.attacks.good_load` prints, run by a process of its own.

    It comes before the server and the attackers where the rights allow it: good clients have machines of
    their own, and a client that waits for a core would measure itself.
    """
    run = subprocess.run(
        ["nice", "-n", "-15", sys.executable, "-m", "tests.attacks.good_load", str(port), str(seconds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
