"""Measures what explanations cost, and how much they slow predictions of the same model.

    python benchmarks/explain.py [models] [--seconds 5] [--per-s 100] [--serve="..."]

starts a server with one web process and prints the CPU time of an explanation of `digits` with 1,000
perturbations beside that of predictions of 1,000 rows, as JSON and as npy. Then it sends small predictions
at a steady rate, in turns alone and beside explanations that follow one another without a pause, and prints
p50 and p99 of the predictions, and the CPU time of the server for each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from inferpool.wire.npy import encode_npy

from benchmarks.fairness import Load, Outcome, percentile, run_loads, wait_ready
from benchmarks.wrong_keys import PORT, cpu_s

URL = f"http://127.0.0.1:{PORT}"
MODEL = "digits"
PERTURBATIONS = 1000
REPEATS = 20
"""Explanations and predictions whose CPU time is measured together: the kernel counts in hundredths."""


def cost_ms(server: int, send: Callable[[], httpx.Response]) -> float:
    """Return the least CPU time of a request that `send` sends, in milliseconds."""
    least = math.inf
    for _ in range(5):
        before = cpu_s(server)
        for _ in range(REPEATS):
            assert send().status_code == 200
        least = min(least, 1000 * (cpu_s(server) - before) / REPEATS)
    return least


def report_costs(server: int, client: httpx.Client) -> None:
    """Print the CPU time of an explanation, and of predictions of as many rows."""
    rows = np.random.default_rng(0).random((PERTURBATIONS, 1, 8, 8)).astype(np.float32)
    one = json.dumps({"inputs": rows[:1].tolist()}).encode()
    many = json.dumps({"inputs": rows.tolist(), "outputs": ["logits"]}).encode()
    npy = encode_npy(rows)
    as_npy = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    explained = cost_ms(
        server, lambda: client.post(f"/explain/{MODEL}?passes={PERTURBATIONS + 2}", content=one)
    )
    print(f"{PERTURBATIONS} perturbations{'':14} {explained:6.2f} ms CPU", flush=True)
    for name, body, headers in (("JSON", many, {}), ("npy", npy, as_npy)):
        predicted = cost_ms(
            server,
            lambda: client.post(f"/predict/{MODEL}", content=body, headers=headers),  # noqa: B023
        )
        print(
            f"prediction of {PERTURBATIONS} rows, {name:<5} {predicted:6.2f} ms CPU:"
            f" explained for {explained / predicted:.2f} times as much",
            flush=True,
        )


class Explanations:
    """Explanations that follow one another, from a thread, until `end`."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._ends = threading.Event()
        self._made = 0
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        with httpx.Client(base_url=URL, timeout=60) as client:
            while not self._ends.is_set():
                path = f"/explain/{MODEL}?passes={PERTURBATIONS + 2}"
                self._made += client.post(path, content=self._body).status_code == 200

    def end(self) -> int:
        """Return how many were answered."""
        self._ends.set()
        self._thread.join()
        return self._made


def report_latency(seconds: float, per_s: float) -> None:
    """Print p50 and p99 of predictions alone and beside explanations, of five turns each."""
    rows = np.random.default_rng(0).random((1, 1, 8, 8)).tolist()
    body = json.dumps({"inputs": rows}).encode()
    load = Load("predictions", "", per_s, 16)
    found: dict[str, list[Outcome]] = {"alone": [], "beside": []}
    made = 0
    for _ in range(5):
        for kind, outcomes in found.items():
            beside = Explanations(body) if kind == "beside" else None
            outcomes.append(
                asyncio.run(run_loads(PORT, body, [load], seconds, f"/predict/{MODEL}"))[load.tenant]
            )
            made += beside.end() if beside is not None else 0
    for kind, outcomes in found.items():
        p50, p99 = (
            1000 * statistics.median(percentile(outcome.seconds, part) for outcome in outcomes)
            for part in (0.5, 0.99)
        )
        more = f" {made} explanations" if kind == "beside" else ""
        print(
            f"{per_s:.0f} predictions a second, {kind}{more}: p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True
        )


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path, nargs="?", default=Path("models"))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--per-s", type=float, default=100.0)
    parser.add_argument("--serve", default="", help="more flags of inferpool serve, as one text")
    arguments = parser.parse_args()
    flags = ["--port", str(PORT), "--log-level", "error", *shlex.split(arguments.serve)]
    command = [sys.executable, "-m", "inferpool", "serve", str(arguments.repository), *flags]
    server = subprocess.Popen(command)
    try:
        wait_ready(MODEL)
        with httpx.Client(base_url=URL, timeout=60) as client:
            report_costs(server.pid, client)
        report_latency(arguments.seconds, arguments.per_s)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
