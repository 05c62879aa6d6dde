"""A server that nobody asks uses next to nothing of a core."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from tests.conftest import WITH_SPARE, MakeChaos, Serve
from tests.engine.processes import children
from tests.server import wait_until

WINDOW_S = 1.0
MOST_SHARE = 0.01


def cpu_s(pid: int) -> float:
    """The time on cores that all threads of a process have had, in seconds."""
    used_ns = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            used_ns += int((thread / "schedstat").read_text().split()[0])
    return used_ns / 1e9


def test_an_idle_server_uses_less_than_a_hundredth_of_a_core(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m"), "--engine", "process", "--web-processes", "2", **WITH_SPARE)
    server.wait_loaded()
    # Two web processes, an engine, and the spare engine that starts after it.
    wait_until(lambda: len(children(server)) == 4, "all processes run")
    pids = [server.process.pid, *children(server)]

    def is_idle() -> bool:
        begun, before = time.monotonic(), sum(map(cpu_s, pids))
        time.sleep(WINDOW_S)
        used = sum(map(cpu_s, pids)) - before
        return used < MOST_SHARE * (time.monotonic() - begun)

    # The first window may still have a part of the start.
    wait_until(is_idle, f"all processes use less than {MOST_SHARE} of a core")
