"""Attacks a confined server, and says what good clients saw of it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.attacks.attacks import attack_once
from tests.attacks.confined import MEMORY_BYTES, ConfinedServer, measure_apart
from tests.attacks.good_load import Quality

LIVE_MS = 100.0
"""`/health/live` answers within so many milliseconds."""
SLOWER = 5.0
"""The 99th percentile of good requests may become so many times slower."""
ATTACKERS = 3
"""Attacks that are under way at a time."""


class Outcome(NamedTuple):
    """The figures of good clients: while nobody attacked, and then under attack."""

    quiet: Quality
    attacked: Quality
    rounds: Counter[str]
    peak_bytes: int
    ended: int | None
    confined_by: str

    def text(self) -> str:
        """The figures, for people."""
        lines = [f"confined by {self.confined_by}: 1 CPU, {MEMORY_BYTES >> 20} MiB"]
        for name, quality in (("quiet", self.quiet), ("attacked", self.attacked)):
            lines.append(
                f"{name:9} {quality.requests} good requests, {len(quality.failures)} failed,"
                f" p50 {quality.p50_ms} ms, p99 {quality.p99_ms} ms, slowest {quality.slowest_ms} ms;"
                f" /health/live p99 {quality.live_p99_ms} ms, slowest {quality.live_slowest_ms} ms;"
                f" the client itself was late by {quality.late_p99_ms} ms (p99)"
            )
        lines.append(f"memory    at most {self.peak_bytes >> 20} MiB")
        lines.append(
            "attacks   " + ", ".join(f"{name} {count}" for name, count in sorted(self.rounds.items()))
        )
        lines.extend(sorted(set(self.attacked.failures))[:10])
        return "\n".join(lines)

    def faults(self, live_ms: float, slower: float) -> list[str]:
        """The promises that do not hold."""
        found = []
        if self.ended is not None:
            found.append(f"the server ended with {self.ended}")
        if self.attacked.failures:
            found.append(f"{len(self.attacked.failures)} good requests failed")
        if self.attacked.live_slowest_ms > live_ms:
            found.append(f"/health/live took {self.attacked.live_slowest_ms} ms")
        if self.attacked.p99_ms > slower * self.quiet.p99_ms:
            found.append(f"good requests' p99 rose from {self.quiet.p99_ms} to {self.attacked.p99_ms} ms")
        if self.peak_bytes > MEMORY_BYTES:
            found.append(f"the server held {self.peak_bytes} bytes")
        return found


def run(models: Path, cache_dir: Path, seconds: float, names: Sequence[str], python: str) -> Outcome:
    """Measure good requests for a fifth of `seconds` quietly, then for the rest under the attacks `names`."""
    server = ConfinedServer(models, cache_dir, python)
    attackers: list[threading.Thread] = []
    over = threading.Event()
    try:
        server.wait_loaded()
        quiet = _quality(server.port, seconds / 5)
        rounds: Counter[str] = Counter()
        attackers += [
            threading.Thread(target=_attack, args=(server.port, names, first, rounds, over), daemon=True)
            for first in range(ATTACKERS)
        ]
        for attacker in attackers:
            attacker.start()
        attacked = _quality(server.port, 4 * seconds / 5)
        over.set()
        ended = server.process.poll()
        peak = server.peak_bytes() if ended is None else 0
        return Outcome(quiet, attacked, rounds, peak, ended, server.confined_by)
    finally:
        over.set()
        server.kill()
        for attacker in attackers:
            attacker.join()


def _quality(port: int, seconds: float) -> Quality:
    return Quality(**json.loads(measure_apart(port, seconds)))


def _attack(port: int, names: Sequence[str], first: int, rounds: Counter[str], over: threading.Event) -> None:
    """Make one attack after the other, beginning with another one than the other attackers."""
    number = first * len(names) // ATTACKERS
    while not over.is_set():
        name = names[number % len(names)]
        attack_once(name, port)
        rounds[name] += 1
        number += 1
        time.sleep(0.01)
