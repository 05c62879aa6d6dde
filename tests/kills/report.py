"""Runs the suite, and says what came of it."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.engine.processes import children, lives
from tests.kills.census import Census, holders, memory_files, take_census
from tests.kills.killer import MEMORY_BYTES, Killer
from tests.kills.load import Load
from tests.kills.workload import Workload
from tests.limited import LimitedServer, missing
from tests.server import Server, wait_until

SHARES: Final = {
    "engine": 0.55,
    "engine and its successor": 0.1,
    "stopped engine": 0.05,
    "web process": 0.2,
    "poison by fault": 0.06,
    "engine without memory": 0.04,
}
FIRST: Final = (
    *("engine", "web process", "poison by fault", "engine and its successor", "engine without memory"),
    *("engine", "stopped engine", "poison by division"),
)
"""What is ended first in each round, so that every kind is."""
CLIENTS: Final = 48
EVERY: Final = 600
MOST_FAULTS: Final = 20
"""A round ends after so many faults."""
CENSUSES: Final = 5
"""How often in a round memory and descriptors are counted."""
ORPHANS_S: Final = 10.0
"""How long processes may live after their supervisor."""
MOST_GROWTH: Final = 1.15
MOST_GROWTH_BYTES: Final = 24 * 2**20
"""Memory is flat if it grows by no more than this share, or these bytes for each process."""


class Round(NamedTuple):
    """What came of one server."""

    answers: Mapping[int, int]
    requests: int
    rows: int
    hung_up: int
    lost: int
    latest_s: float
    slowest_s: float
    seconds: float
    ends: Mapping[str, int]
    stopped_s: list[float]
    killed_for_memory: int
    censuses: list[Census]
    faults: list[str]

    def summary(self) -> dict[str, Any]:
        """The figures without the counts of what processes held."""
        return {key: value for key, value in self._asdict().items() if key != "censuses"}


def run_round(
    requests: int,
    *,
    seed: int,
    python: str = sys.executable,
    first: tuple[str, ...] = FIRST,
    shares: Mapping[str, float] = SHARES,
    clients: int = CLIENTS,
    censuses: int = CENSUSES,
    every: int = EVERY,
    seconds: float = math.inf,
    drain: bool = False,
) -> Round:
    """Send requests to a new server while its processes are ended; end its supervisor at last.

    After the kinds of `first`, something of `shares` is ended after each `every` requests. After `seconds` no
    more requests are sent.

    With `drain` the supervisor gets SIGTERM, else SIGKILL while requests are under way.
    """
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        workload = Workload(repository, seed)
        # Queues have room for all that clients send during a reload.
        flags = ("--engine", "process", "--web-processes", "2", "--measure-ms", "20", "--queue-ms", "60000")
        environ = {"INFERPOOL_CACHE_DIR": str(Path(folder) / "cache")}
        server: Server
        if missing():
            server = Server(repository, flags, environ, python=python)
        else:
            server = LimitedServer(repository, MEMORY_BYTES, flags, environ, python)
        try:
            server.wait_loaded()
            return asyncio.run(
                _run(
                    server,
                    workload,
                    requests,
                    seed,
                    first,
                    shares,
                    clients,
                    censuses,
                    every=every,
                    seconds=seconds,
                    drain=drain,
                )
            )
        finally:
            server.kill()


async def _run(
    server: Server,
    workload: Workload,
    requests: int,
    seed: int,
    first: tuple[str, ...],
    shares: Mapping[str, float],
    clients: int,
    censuses: int,
    *,
    every: int,
    seconds: float,
    drain: bool,
) -> Round:
    load = Load(server.port, workload, clients, seed)
    killer = Killer(server, load, seed)
    begun = time.monotonic()

    def goes_on(goal: int) -> bool:
        late = time.monotonic() > begun + seconds
        return not (
            late
            or load.requests >= goal
            or server.process.poll() is not None
            or len(load.faults) >= MOST_FAULTS
        )

    load.start()
    await load.reach(min(300, requests // 5))
    await killer.end_each([kind for kind in first if kind != "engine without memory" or not missing()])
    counted = []
    for number in range(1, censuses + 1):
        goal = requests * number // censuses
        while goes_on(goal):
            await load.reach(min(goal, load.requests + every))
            if shares:
                await killer.end_one(shares)
        await load.pause()
        counted.append(await asyncio.to_thread(take_census, server, load.requests))
        if number < censuses:
            load.resume()
    if server.process.poll() is not None:
        load.blame(f"the server ended with {server.process.returncode}")
    took_s = time.monotonic() - begun
    killed_for_memory = server.kills() if isinstance(server, LimitedServer) else 0
    await _end(server, load, drain=drain)
    return Round(
        dict(load.answers), load.requests, load.rows, load.hung_up, load.lost, load.latest_s, load.slowest_s,
        took_s, dict(killer.ends), killer.stopped_s, killed_for_memory, counted,
        load.faults + growth(counted),
    )  # fmt: skip


async def _end(server: Server, load: Load, *, drain: bool) -> None:
    """End the server: everything must end with it."""
    pids, memory = children(server), memory_files(server.process.pid)
    load.resume()
    if drain:
        await load.finish()
        status = await asyncio.to_thread(server.stop)
        if status:
            load.blame(f"the server ended with {status} after SIGTERM")
    else:
        await load.reach(load.requests + 20)
        load.abandon()
        server.process.kill()
    try:
        gone = "all processes end with their supervisor"
        await asyncio.to_thread(wait_until, lambda: not any(map(lives, pids)), gone, ORPHANS_S)
    except AssertionError as error:
        load.blame(str(error))
    await load.finish()
    await asyncio.to_thread(server.process.wait)
    if await asyncio.to_thread(holders, memory):
        load.blame("shared memory is left")


def growth(counted: list[Census]) -> list[str]:
    """What has grown, between the last count and the first one of as many processes."""
    last = counted[-1]
    first = next(census for census in counted if census.processes == last.processes)
    found = []
    for kind, count in last.processes.items():
        if last.descriptors[kind] > first.descriptors[kind]:
            found.append(f"{kind}: from {first.descriptors[kind]} to {last.descriptors[kind]} descriptors")
        bound = max(MOST_GROWTH * first.pss[kind], first.pss[kind] + count * MOST_GROWTH_BYTES)
        if last.pss[kind] > bound:
            found.append(f"{kind}: from {first.pss[kind] >> 20} to {last.pss[kind] >> 20} MiB")
    return found


def as_json(rounds: list[Round]) -> dict[str, Any]:
    """The sums of all rounds, and the counts of each."""
    answers: Counter[int] = Counter()
    ends: Counter[str] = Counter()
    for each in rounds:
        answers.update(each.answers)
        ends.update(each.ends)
    stopped = [seconds for each in rounds for seconds in each.stopped_s]
    return {
        "cores": os.cpu_count(),
        "rounds": len(rounds),
        "clients": CLIENTS,
        "memory_limit_mib": 0 if missing() else MEMORY_BYTES >> 20,
        "requests": sum(each.requests for each in rounds),
        "rows_compared": sum(each.rows for each in rounds),
        "seconds": round(sum(each.seconds for each in rounds)),
        "answers": {str(status): count for status, count in sorted(answers.items())},
        "left_by_their_clients": sum(each.hung_up for each in rounds),
        "lost_with_their_web_process": sum(each.lost for each in rounds),
        "slowest_s": round(max(each.slowest_s for each in rounds), 2),
        "deadline_missed_by_at_most_s": round(max(each.latest_s for each in rounds), 3),
        "ends": dict(sorted(ends.items())),
        "killed_for_memory": sum(each.killed_for_memory for each in rounds),
        "stopped_processes_ended_after_s": [round(seconds, 1) for seconds in sorted(stopped)],
        "censuses": [[census._asdict() for census in each.censuses] for each in rounds],
        "faults": [fault for each in rounds for fault in each.faults],
    }


def as_markdown(figures: Mapping[str, Any]) -> str:
    """The figures of `as_json` as a page."""
    answers = ", ".join(f"{count:,} × {status}" for status, count in figures["answers"].items())
    ends = [f"| {kind} | {count} |" for kind, count in figures["ends"].items()]
    stopped = figures["stopped_processes_ended_after_s"]
    lines = [
        "# Processes of a server are ended at random",
        "",
        f"{figures['rounds']} servers of two web processes, {figures['at_once']} at a time, on"
        f" {figures['cores']} cores; {figures['clients']} keep-alive clients each;"
        f" {figures['seconds']} s of each together.",
        "",
        "| | |",
        "|---|---|",
        f"| requests | {figures['requests']:,} |",
        f"| answers | {answers} |",
        f"| rows compared | {figures['rows_compared']:,} |",
        f"| left by their clients | {figures['left_by_their_clients']:,} |",
        f"| lost with their web process | {figures['lost_with_their_web_process']:,} |",
        f"| faults | {len(figures['faults'])} |",
        f"| slowest answer | {figures['slowest_s']} s |",
        f"| a 504 came at most so long after its deadline | {figures['deadline_missed_by_at_most_s']} s |",
        "",
        "| ended | times |",
        "|---|---|",
        *ends,
        f"| processes killed by the kernel for want of memory | {figures['killed_for_memory']} |",
        "",
        f"Stopped processes were ended after {stopped[0]} to {stopped[-1]} s." if stopped else "",
        "Held when no request was under way, at the beginning and at the end of each round:",
        "",
        "| round | requests | processes | memory (PSS), MiB | descriptors | shared memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for number, censuses in enumerate(figures["censuses"], 1):
        for census in (censuses[0], censuses[-1]):
            pss = " · ".join(f"{held >> 20}" for held in census["pss"].values())
            processes, descriptors = (
                " · ".join(map(str, census[name].values())) for name in ("processes", "descriptors")
            )
            shared = census["shared"] / 2**20
            lines.append(
                f"| {number} | {census['requests']:,} | {processes} | {pss} | {descriptors} | {shared:.0f} |"
            )
    kinds = " · ".join(figures["censuses"][0][0]["processes"])
    lines += ["", f"Processes, memory and descriptors are those of the {kinds}."]
    lines += [f"- {fault}" for fault in figures["faults"]]
    return "\n".join(lines)
