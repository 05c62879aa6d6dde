"""Starts a server in a process of its own, as a user would."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
CHAOS = ROOT / "tests" / "chaos"
PATCHES = ROOT / "tests" / "servers" / "site"
START_S = 120
"""How long a server may take to start, and a condition to come true, on a busy machine."""
POLL_S = 0.02
"""Pause between the first looks at a condition."""
LONGEST_POLL_S = 0.1
POLL_SHARE = 0.1
"""Later looks pause for this share of what was waited; each look takes time that what is waited for needs."""
COVERAGE_VARIABLES = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
"""A Python process that starts with one of these variables measures its coverage."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Wait until `condition()` holds; fails with `what` after `timeout_s` seconds.

    It is looked at every 20 ms in the beginning, and every 100 ms after a second.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(min(LONGEST_POLL_S, max(POLL_S, POLL_SHARE * waited)))


def free_port() -> int:
    """Return a port that no program uses, for programs that must be told one.

    The kernel gives ports of a range of its own to connections and to servers that ask for port 0. A port of
    that range could be taken a moment later, so this one is below the range.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, lowest)
        with contextlib.suppress(OSError), socket.create_server(("0.0.0.0", port)):
            return port


class Server:
    """`inferpool serve` on a free port; a thread reads the log as it is written."""

    def __init__(
        self,
        repository: Path,
        flags: Sequence[str] = (),
        environ: Mapping[str, str] = {},
        module: str = "inferpool",
        python: str = sys.executable,
        cwd: Path | None = None,
    ) -> None:
        """Run the server that is installed for the interpreter `python`, in the folder `cwd`."""
        own = {"INFERPOOL_LOG_FORMAT": "json", "PYTHONPATH": f"{ROOT}:{CHAOS}:{PATCHES}"}
        command = [python, "-m", module, "serve", str(repository), "--port", "0", *flags]
        self._start(command, {**own, **environ}, cwd)

    def _start(self, command: Sequence[str], environ: Mapping[str, str], cwd: Path | None = None) -> None:
        """Run `command` and wait until it listens; `environ` adds to this process's."""
        self.process = subprocess.Popen(
            command, env={**os.environ, **environ}, stderr=subprocess.PIPE, text=True, cwd=cwd
        )
        # Each request has a connection of its own, as with `httpx.get`, and needs no new client. Without
        # `verify=False` a client loads the certificates of the machine, for plain HTTP.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(timeout=START_S, verify=False, limits=limits)
        self.log: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self.wait_for(r"listening on (\S+)").group(1)
        except AssertionError:
            self.kill()
            raise
        self.port = 0 if self.url.startswith("unix:") else int(self.url.rsplit(":", 1)[1])

    def wait_for(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait until a log line matches; fails with the whole log if the process ends or time is up."""
        found: re.Match[str] | None = None

        def seen() -> bool:
            nonlocal found
            found = next((m for line in self.log if (m := re.search(pattern, line["message"]))), None)
            return found is not None or not self._reader.is_alive()

        with self._news:
            self._news.wait_for(seen, timeout_s)
        if found is None:
            raise AssertionError(f"no log line matches {pattern!r}: {json.dumps(self.log, indent=1)}")
        return found

    def wait_loaded(self) -> None:
        """Wait until every model is ready or has failed."""
        self.wait_for(r"\d+ models$")

    def get(self, path: str, **options: Any) -> httpx.Response:
        """One GET request."""
        return self._client.get(self.url + path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request of any method."""
        return self._client.request(method, self.url + path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """One POST request."""
        return self._client.post(self.url + path, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The current sum of a metric's samples that have these labels."""
        name = f"inferpool_{name}"
        # To parse the whole page, again and again, would take more time than the server has for its answer.
        page = self.get("/metrics", headers={"accept-encoding": "identity"}).text
        lines = [line for line in page.splitlines(True) if line.startswith(name)]
        return sum(
            sample.value
            for family in text_string_to_metric_families("".join(lines))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_for_metric(
        self,
        name: str,
        at_least: float = -math.inf,
        at_most: float = math.inf,
        timeout_s: float = START_S,
        **labels: str,
    ) -> float:
        """Wait until a metric is within its limits; returns its value, fails after `timeout_s` seconds."""
        value = math.nan

        def within() -> bool:
            nonlocal value
            value = self.metric(name, **labels)
            return at_least <= value <= at_most

        wait_until(within, f"{name}{labels or ''} from {at_least:g} to {at_most:g}", timeout_s)
        return value

    def processes(self) -> list[int]:
        """The ids of the server's processes: the one that was started, and its children, if any."""
        return _with_children(self.process.pid)

    def web_process(self) -> int:
        """The id of a process that reads requests: a web process, or the only process."""
        for pid in self.processes():
            if Path(f"/proc/{pid}/comm").read_text() == "inferpool-web\n":
                return pid
        return self.process.pid

    def status_bytes(self, field: str) -> int:
        """A field of `/proc/PID/status`, the sum of all processes; shared pages count in each of them."""
        return 1024 * sum(_kib_of(pid, "status", f"{field}:") for pid in self.processes())

    def resident_bytes(self, *, spare: bool = True) -> int:
        """Return the memory that the server's processes hold together, in bytes; shared pages count once.

        A spare engine, which starts at some time after the others, counts only with `spare`. A child has the
        name of its program until it knows its own, and all others know theirs once the server is ready.
        """
        counted = self.processes()
        if not spare:
            names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in counted[1:]}
            counted = counted[:1] + [
                pid
                for pid, name in names.items()
                if name.startswith("inferpool-") and name != "inferpool-spare"
            ]
        return 1024 * sum(_kib_of(pid, "smaps_rollup", "Pss:") for pid in counted)

    def stop(self, timeout_s: float = START_S) -> int:
        """Send SIGTERM and wait until the process ends; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout_s)
        self._reader.join(5)
        return status

    def kill(self) -> None:
        """End the server, whatever it is doing; while coverage is measured, let it write its data first."""
        if any(name in os.environ for name in COVERAGE_VARIABLES):
            self._end_with_coverage()
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._client.close()

    def _end_with_coverage(self) -> None:
        # The first signal drains, the second stops at once.
        for _ in range(2):
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            try:
                line = json.loads(text)
            except ValueError:
                line = {"message": text.rstrip("\n"), "level": "raw"}
            with self._news:
                self.log.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (thread / "children").read_text().split():
                found += _with_children(int(child))
    return found


def _kib_of(pid: int, file: str, field: str) -> int:
    """A number of a file of `/proc`; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    return 0
