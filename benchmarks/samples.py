"""Measures how much samples of requests slow predictions.

    python -m benchmarks.samples [models] [--sampled 0.1] [--rounds 14] [--seconds 2] [--share 0.25]
        [--per-s 0] [--one-by-one] [--by-choice] [--starts 1] [--server-cores 1] [--client-cores 0]

starts two servers with the model `digits`. One keeps samples of a share of the requests, with all inputs and
outputs; the other one keeps none. A client sends small predictions at random moments to one server at a
time, in turns; both rounds of a pair have the same moments. Times are taken, and printed, as `explain.py`
does. The client has the first core, and the servers the others. At the end stands how many samples were
written, and dropped because they would take more than their share of a core.

Two processes that do the same may differ by more than what is looked for, so more `--starts` are better: each
starts new servers for its part of the rounds, and the other one of the two first. With `--by-choice` there is
one server, which samples, and one connection. The client knows the key, and so which of its requests are
chosen. The times of those are compared with the times of the others in the same rounds.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import math
import os
import random
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from inferpool.privacy.keys import SampleKeys, is_chosen, threshold_of

from benchmarks.explain import (
    MODEL,
    Round,
    Sending,
    capacity,
    cores_of,
    predict_always,
    print_rounds,
    read_response,
    request_of,
    start,
)
from benchmarks.load_beside import Admin, share_cores, stolen_ticks
from benchmarks.percentiles import print_pooled
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


def predict_by_id(port: int, cores: set[int], body: bytes, pipe: Connection) -> None:
    """Send a prediction for each id and gap in seconds that come by `pipe`; the times of all go back.

    A time is NaN if the hypervisor took a core meanwhile.
    """
    os.sched_setaffinity(0, cores)
    while True:
        sending: list[tuple[str, float]] = pipe.recv()
        times, due = list[float](), time.monotonic()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for request_id, gap_s in sending:
                request = request_of(f"/predict/{MODEL}", body, f"X-Request-Id: {request_id}\r\n")
                time.sleep(max(0.0, due - time.monotonic()))
                stolen, since = stolen_ticks(), time.monotonic()
                connection.sendall(request)
                read_response(connection)
                taken_s = time.monotonic() - since
                times.append(taken_s if stolen == stolen_ticks() else math.nan)
                due = max(due, since) + gap_s
        pipe.send(times)


def measure_by_choice(
    port: int,
    keys: SampleKeys,
    body: bytes,
    rate: float,
    sides: tuple[list[list[float]], list[list[float]]],
    options: argparse.Namespace,
) -> None:
    """Send predictions to one server, and add to `sides` the times of the others and of the chosen ones."""
    pipe = start(predict_by_id, port, options.client_cores, body)
    threshold = threshold_of(options.sampled)
    first = len(sides[0])
    for number in range(first - 1, first + options.rounds // options.starts):
        draw = random.Random(number)
        ids = [f"{number}-{draw.getrandbits(64):x}" for _ in range(int(options.seconds * rate))]
        pipe.send([(each, draw.expovariate(rate)) for each in ids])
        times: tuple[list[float], list[float]] = ([], [])
        for each, taken_s in zip(ids, pipe.recv(), strict=True):
            if not math.isnan(taken_s):
                times[is_chosen(keys.choice_key, each, threshold)].append(taken_s)
        if number >= first:  # the first round warms up
            sides[0].append(times[0])
            sides[1].append(times[1])
    pipe.close()


def print_choice(others: list[list[float]], chosen: list[list[float]], rate: float) -> None:
    """Print how long the chosen requests, and all together, took beside the others."""
    print(f"{rate:.0f} predictions a second, {len(others)} rounds")
    print(f"{sum(map(len, others))} others, and {sum(map(len, chosen))} that were chosen:")
    print_pooled(others, chosen)
    print("others, and all together:")
    print_pooled(others, [one + other for one, other in zip(others, chosen, strict=True)])


def measure(
    servers: Sequence[tuple[int, int]],
    body: bytes,
    rate: float,
    rounds: tuple[list[Round], list[Round]],
    options: argparse.Namespace,
) -> None:
    """Send predictions to both servers, in turns, and add how long they took to `rounds`."""
    request = request_of(f"/predict/{MODEL}", body)
    pipes = [start(predict_always, port, options.client_cores, request) for _, port in servers]

    def run(which: int, seconds: float, seed: int) -> Round:
        before = cpu_s(servers[which][0])
        pipe: Connection = pipes[which]
        pipe.send(Sending(seconds, rate, seed, options.one_by_one))
        times = pipe.recv()
        return Round(times, [], cpu_s(servers[which][0]) - before)

    for which in (0, 1):
        run(which, 1.0, 0)
    for number in range(len(rounds[0]), len(rounds[0]) + options.rounds // options.starts):
        for which in (0, 1) if number % 2 else (1, 0):
            rounds[which].append(run(which, options.seconds, number))
    for pipe in pipes:
        pipe.close()


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path, nargs="?", default=Path("models"))
    parser.add_argument("--sampled", type=float, default=0.1, help="the share of requests that are sampled")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument(
        "--starts", type=int, default=1, help="how often servers start, for equal parts of the rounds"
    )
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--share", type=float, default=0.25, help="of the rate that one connection reaches")
    parser.add_argument("--per-s", type=float, default=0.0)
    parser.add_argument("--one-by-one", action="store_true", help="one connection, timed from the sending")
    parser.add_argument(
        "--by-choice", action="store_true", help="chosen requests beside others, of one server"
    )
    client, others = share_cores(argparse.Namespace(one_core=False))
    parser.add_argument("--server-cores", type=cores_of, default=others)
    parser.add_argument("--client-cores", type=cores_of, default=client)
    options = parser.parse_args()
    print("$", shlex.join(("scripts/bench", "samples", *sys.argv[1:])), flush=True)
    settings = f'\n[samples]\nshare = {options.sampled}\nfields = {{"*" = "keep", "image" = "keep"}}\n'
    body = json.dumps({"inputs": np.random.default_rng(0).random((1, 1, 8, 8)).tolist()}).encode()
    with tempfile.TemporaryDirectory() as name:
        folder, secret = Path(name), secrets.token_bytes(32)
        key_file = folder / "keys"
        key_file.write_text(f"first {base64.b64encode(secret).decode()}\n")
        key_file.chmod(0o600)
        plain = copy_model(options.repository, folder / "plain", "")
        sampled = copy_model(options.repository, folder / "sampled", settings)
        kept = ("--samples-dir", str(folder / "kept"), "--samples-keys-file", str(key_file))
        rounds: tuple[list[Round], list[Round]] = ([], [])
        sides: tuple[list[list[float]], list[list[float]]] = ([], [])
        found: Counter[str] = Counter()
        rate = options.per_s
        for number in range(options.starts):
            with contextlib.ExitStack() as stack:
                os.sched_setaffinity(0, options.server_cores)
                servers = [(0, 0), (0, 0)]
                for which in (1,) if options.by_choice else (0, 1) if number % 2 == 0 else (1, 0):
                    running = serving(sampled, *kept) if which else serving(plain)
                    servers[which] = stack.enter_context(running)
                os.sched_setaffinity(0, options.client_cores)
                port = servers[1][1]
                rate = rate or options.share * capacity(port, request_of(f"/predict/{MODEL}", body))
                if options.by_choice:
                    measure_by_choice(port, SampleKeys({"first": secret}), body, rate, sides, options)
                else:
                    measure(servers, body, rate, rounds, options)
                found.update(outcomes(port))
        if options.by_choice:
            print_choice(*sides, rate)
        else:
            print_rounds({"without": rounds[0], "sampled": rounds[1]}, rate, options)
        print(f"share {options.sampled:g} of the requests:", dict(found))


if __name__ == "__main__":
    main()
