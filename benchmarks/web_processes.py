"""How many requests one, two and four web processes answer, each on a core of its own.

    scripts/bench web_processes [--counts 1,2,4] [--rounds 3] [--seconds 4] [--connections 64] [--out FILE]

Starts `inferpool serve --engine process --web-processes N` on the first N + 1 cores that this process may
use, one more than web processes for the engine, and loads it with one wrk for each web process on the other
cores. The servers take turns. Prints the medians of small JSON requests a second, how many times those of the
first count that is, the CPU time of a request, and p50 and p99; on a machine with too few cores it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.peers.load import closed_loop
from benchmarks.peers.measure import ANSWER_S, WARM_S, answers, at_model, environ
from benchmarks.peers.peers import PEERS
from benchmarks.peers.processes import Server, free_port
from benchmarks.peers.workloads import WORKLOADS, model_file, samples

WORKLOAD = WORKLOADS["row-json"]
Record = dict[str, float]


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="scripts/bench web_processes", description=__doc__)
    parser.add_argument("--counts", default="1,2,4", help="numbers of web processes, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--connections", type=int, default=64, help="connections of each wrk")
    parser.add_argument("--out", type=Path, help="a file for the records, as JSON")
    given = parser.parse_args()
    counts = [int(count) for count in given.counts.split(",")]
    cores = sorted(os.sched_getaffinity(0))
    most = max(counts)
    need = most + 1 + (most + 1) // 2  # one wrk keeps two web processes busy
    if len(cores) < need:
        print(f"{need} cores are needed, and there are {len(cores)}", file=sys.stderr)
        return 1
    records: dict[int, list[Record]] = {count: [] for count in counts}
    for _ in range(given.rounds):
        for count in counts:
            records[count].append(measure(count, cores, given.connections, given.seconds))
    print(table(records))
    if given.out is not None:
        given.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def measure(count: int, cores: Sequence[int], connections: int, seconds: float) -> Record:
    """Return the figures of a server with `count` web processes."""
    port = free_port()
    sample = samples(WORKLOAD)[0]
    request = at_model(PEERS["inferpool"], WORKLOAD, sample)
    command = [
        *("taskset", "--cpu-list", ",".join(map(str, cores[: count + 1]))),
        *(sys.executable, "-m", "inferpool", "serve", str(model_file(WORKLOAD).parents[1])),
        *("--port", str(port), "--engine", "process", "--web-processes", str(count)),
    ]
    os.sched_setaffinity(0, cores[count + 1 :])  # inherited by wrk; taskset gives the server its own
    with tempfile.TemporaryDirectory(prefix="web-", ignore_cleanup_errors=True) as folder:
        server = Server(command, environ(Path(sys.executable)), Path(folder))
        try:
            server.wait(lambda: answers(port, sample, request, ANSWER_S))
            with ThreadPoolExecutor(count) as loads:

                def load(length_s: float) -> list[Record]:
                    asked = [
                        loads.submit(closed_loop, port, request, connections, length_s) for _ in range(count)
                    ]
                    return [one.result() for one in asked]

                load(WARM_S)
                before = server.cpu_s()
                parts = load(seconds)
                cpu_s = server.cpu_s() - before
        finally:
            server.stop()
    if wrong := sum(part["refused"] + part["lost"] for part in parts):
        raise SystemExit(f"{wrong:.0f} requests were refused or lost")
    return {
        "requests_per_s": sum(part["requests_per_s"] for part in parts),
        "cpu_us": 1e6 * cpu_s / sum(part["requests"] for part in parts),
        "p50_ms": max(part["p50_ms"] for part in parts),
        "p99_ms": max(part["p99_ms"] for part in parts),
    }


def table(records: dict[int, list[Record]]) -> str:
    """Return the medians as a table in Markdown."""
    lines = [
        "| web processes | requests/s | times the first | CPU of a request, µs | p50, ms | p99, ms |",
        "|---|---|---|---|---|---|",
    ]
    first = 0.0
    for count, rounds in records.items():
        middle = {name: statistics.median(record[name] for record in rounds) for name in rounds[0]}
        first = first or middle["requests_per_s"]
        lines.append(
            f"| {count} | {middle['requests_per_s']:,.0f} | {middle['requests_per_s'] / first:.2f} |"
            f" {middle['cpu_us']:.1f} | {middle['p50_ms']:.2f} | {middle['p99_ms']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
