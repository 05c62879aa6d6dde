"""Measures how much samples of requests slow predictions.

    python -m benchmarks.samples [models] [--sampled 0.1] [--rounds 14] [--seconds 2] [--share 0.25]
        [--per-s 0] [--one-by-one] [--server-cores 1] [--client-cores 0]

starts two servers with the model `digits`. One keeps samples of a share of the requests, with all inputs and
outputs; the other one keeps none. A client sends small predictions at random moments to one server at a
time, in turns; both rounds of a pair have the same moments. Times are taken, and printed, as `explain.py`
does. The client has the first core, and the servers the others. At the end stands how many samples were
written, and dropped because they would take more than their share of a core.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.explain import (
    MODEL,
    Round,
    Sending,
    capacity,
    cores_of,
    predict_always,
    print_rounds,
    request_of,
    start,
)
from benchmarks.load_beside import Admin, share_cores
from benchmarks.wrong_keys import cpu_s


@contextlib.contextmanager
def serving(repository: Path, *flags: str) -> Iterator[tuple[int, int]]:
    """Run a server of `repository`; yields the number of its process, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "inferpool", "serve", str(repository), "--port", str(port)]
    with subprocess.Popen([*command, "--log-level", "error", *flags]) as process:
        try:
            Admin(port).await_ready(process)
            yield process.pid, port
        finally:
            process.terminate()


def copy_model(models: Path, target: Path, settings: str) -> Path:
    """Copy the model to a repository of its own, with more in its `model.toml`."""
    shutil.copytree(models / MODEL, target / MODEL)
    with (target / MODEL / "model.toml").open("a", encoding="utf-8") as file:
        file.write(settings)
    return target


def outcomes(port: int) -> dict[str, int]:
    """Return how many samples had each outcome."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("inferpool_samples_total{"):
            name, _, value = line.rpartition(" ")
            found[name.split('outcome="')[1].split('"')[0]] = int(float(value))
    return found


def measure(servers: tuple[tuple[int, int], tuple[int, int]], options: argparse.Namespace) -> None:
    """Send predictions to both servers, in turns, and print how long they took."""
    rows = np.random.default_rng(0).random((1, 1, 8, 8)).tolist()
    request = request_of(f"/predict/{MODEL}", json.dumps({"inputs": rows}).encode())
    rate = options.per_s or options.share * capacity(servers[0][1], request)
    pipes = [start(predict_always, port, options.client_cores, request) for _, port in servers]

    def run(which: int, seconds: float, seed: int) -> Round:
        before = cpu_s(servers[which][0])
        pipe: Connection = pipes[which]
        pipe.send(Sending(seconds, rate, seed, options.one_by_one))
        times = pipe.recv()
        return Round(times, [], cpu_s(servers[which][0]) - before)

    rounds: tuple[list[Round], list[Round]] = ([], [])
    for which in (0, 1):
        run(which, 1.0, 0)
    for number in range(options.rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            rounds[which].append(run(which, options.seconds, number))
    print_rounds({"without": rounds[0], "sampled": rounds[1]}, rate, options)
    print(f"share {options.sampled:g} of the requests:", outcomes(servers[1][1]))


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path, nargs="?", default=Path("models"))
    parser.add_argument("--sampled", type=float, default=0.1, help="the share of requests that are sampled")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--share", type=float, default=0.25, help="of the rate that one connection reaches")
    parser.add_argument("--per-s", type=float, default=0.0)
    parser.add_argument("--one-by-one", action="store_true", help="one connection, timed from the sending")
    client, others = share_cores(argparse.Namespace(one_core=False))
    parser.add_argument("--server-cores", type=cores_of, default=others)
    parser.add_argument("--client-cores", type=cores_of, default=client)
    options = parser.parse_args()
    print("$", shlex.join(("scripts/bench", "samples", *sys.argv[1:])), flush=True)
    settings = f'\n[samples]\nshare = {options.sampled}\nfields = {{"*" = "keep", "image" = "keep"}}\n'
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        keys = folder / "keys"
        keys.write_text(f"first {base64.b64encode(secrets.token_bytes(32)).decode()}\n")
        keys.chmod(0o600)
        plain = copy_model(options.repository, folder / "plain", "")
        sampled = copy_model(options.repository, folder / "sampled", settings)
        os.sched_setaffinity(0, options.server_cores)
        without = stack.enter_context(serving(plain))
        kept = ("--samples-dir", str(folder / "kept"), "--samples-keys-file", str(keys))
        with_samples = stack.enter_context(serving(sampled, *kept))
        os.sched_setaffinity(0, options.client_cores)
        measure((without, with_samples), options)


if __name__ == "__main__":
    main()
