"""A server under test: started, waited for, accounted with all its processes, and ended without a trace.

CPU time is utime and stime of every living process of the server, from /proc, in ticks of usually 10 ms.
Memory is PSS, the proportional set size, of the same: pages that several processes share count once.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
START_S = 90
STOP_S = 10
MARK = "BENCHMARK_PEER"


class ServerError(Exception):
    """A server did not start, or ended too early; the text says what it last wrote."""


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server's process and all its children."""

    def __init__(self, command: list[str], environ: dict[str, str], folder: Path) -> None:
        """Start `command` in `folder`, where also its log and its temporary files go."""
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        self._known: dict[int, int] = {}
        self._log = folder / "server.log"
        name, _, value = self._mark.partition("=")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**environ, name: value, "TMPDIR": str(folder)},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, answers: Callable[[], bool]) -> None:
        """Return once `answers()` is true; raises ServerError where the process ends or time is up."""
        ends = time.monotonic() + START_S
        while not answers():
            self.check()
            if time.monotonic() > ends:
                raise ServerError(f"no right answer within {START_S} s; {self.last_words()}")
            time.sleep(0.1)

    def check(self) -> None:
        """Raise ServerError where the process has ended."""
        if (status := self._process.poll()) is not None:
            raise ServerError(f"ended with status {status}; {self.last_words()}")

    def last_words(self) -> str:
        """The end of the log, without the folders of this machine."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        text = " / ".join(line for line in lines if line)[-600:]
        return "log: " + re.sub(r"(/[\w.-]+)+/", "", text)

    def cpu_s(self) -> float:
        """CPU seconds that the living processes have used since they started."""
        return sum(ticks for _, ticks in self._processes()) / TICKS_PER_S

    def pss_mib(self) -> float:
        """Memory of all processes in MiB, as PSS."""
        kib = 0
        for pid, _ in self._processes():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                kib += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        return kib / 1024

    def stop(self) -> None:
        """End all processes: with SIGTERM first, then with SIGKILL."""
        self._processes()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        ends = time.monotonic() + STOP_S
        while (left := [pid for pid, _ in self._processes()]) and time.monotonic() < ends:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._process.wait()

    def _processes(self) -> list[tuple[int, int]]:
        """Number and CPU ticks of each living process of this server.

        Those are its descendants, those of its session, those that carry its mark in their environment
        (some write their title over it), and those that were one of these before they lost their parent.
        """
        table = dict(process_table())
        own = {pid for pid, began in self._known.items() if pid in table and table[pid].began == began}
        for pid, entry in table.items():
            if pid == self._process.pid or entry.session == self._process.pid or self._is_marked(pid):
                own.add(pid)
        while grown := {pid for pid, entry in table.items() if entry.parent in own} - own:
            own |= grown
        self._known = {pid: table[pid].began for pid in own}
        return [(pid, table[pid].ticks) for pid in sorted(own) if table[pid].lives]

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False


class Entry:
    """A line of the process table."""

    def __init__(self, stat: str) -> None:
        # The name of a process, in parentheses, may contain anything.
        fields = stat.rpartition(")")[2].split()
        self.lives = fields[0] not in "ZX"
        self.parent = int(fields[1])
        self.session = int(fields[3])
        self.ticks = int(fields[11]) + int(fields[12])
        self.began = int(fields[19])


def process_table() -> Iterator[tuple[int, Entry]]:
    """Every process that can be seen."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            yield int(file.parent.name), Entry(file.read_text())
