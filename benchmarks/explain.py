"""Measures what explanations cost, and how much they slow predictions of the same model.

    python -m benchmarks.explain [models] [--rounds 12] [--seconds 2.5] [--share 0.25] [--per-s 0]
        [--one-by-one] [--server-cores 1] [--client-cores 0] [--serve="--engine process"] [--skip-costs]

starts a server with one web process and prints the CPU time of an explanation of `digits` with 1,000
perturbations beside that of predictions of 1,000 rows, as JSON and as npy. Then a client of its own sends
small predictions at random moments, at a share of the rate that one connection reaches (or `--per-s` of
them), in turns alone and beside another client whose explanations follow one another without a pause. A
time counts from the moment at which the request was due, and includes what it waited for requests before it.
With `--one-by-one`, one connection sends a request once the one before it is answered, and a time counts from
the sending: a stall counts once, not for all that it holds up. Requests during which the hypervisor took a
core are left out. Clients have the first core, and the server the others.

It prints the medians of the rounds' p50 and p99, the median and the quartiles of the ratios of each pair of
rounds, the CPU time of the server, and the p50 and p99 of all rounds together with a 95 % interval of their
ratio (a bootstrap over the pairs).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import selectors
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from inferpool.wire.npy import encode_npy

from benchmarks.load_beside import Admin, share_cores, stolen_ticks
from benchmarks.percentiles import percentile, print_pooled
from benchmarks.wrong_keys import cpu_s

MODEL = "digits"
PERTURBATIONS = 1000
REPEATS = 20
"""Explanations and predictions whose CPU time is measured together: the kernel counts in hundredths."""
CONNECTIONS = 8


class Round(NamedTuple):
    """Times of the predictions and of the explanations of a round in seconds, and CPU time of the server."""

    times: list[float]
    explanations: list[float]
    cpu_s: float


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


def request_of(path: str, body: bytes, headers: str = "") -> bytes:
    """Return the bytes of a request; each line of `headers` has its end."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_response(connection: socket.socket) -> bytes:
    """Return the response that comes next, with its head."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += received(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
    while len(body) < length:
        body += received(connection)
    assert head.startswith(b"HTTP/1.1 200"), head
    return body


class Sending(NamedTuple):
    """How predictions are sent in a round: for `seconds`, `rate` of them a second, at moments by `seed`."""

    seconds: float
    rate: float
    seed: int
    one_by_one: bool


def received(connection: socket.socket) -> bytes:
    """Return what has come; raises ConnectionError if nothing more comes."""
    if not (part := connection.recv(65_536)):
        raise ConnectionError("the server has closed the connection")
    return part


def predict_always(port: int, cores: set[int], request: bytes, pipe: Connection) -> None:
    """Send predictions for each `Sending` that comes by `pipe`; the times go back."""
    os.sched_setaffinity(0, cores)
    while True:
        sending: Sending = pipe.recv()
        with contextlib.ExitStack() as stack:
            # In each round anew: a server closes connections that are idle for long.
            connections = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                for _ in range(1 if sending.one_by_one else CONNECTIONS)
            ]
            pipe.send(send_predictions(connections, request, sending))


def send_predictions(connections: Sequence[socket.socket], request: bytes, sending: Sending) -> list[float]:
    """Send a round of predictions; returns the seconds of those that met no stolen time."""
    selector = selectors.SelectSelector()  # epoll waits for whole milliseconds
    for each in connections:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(each, selectors.EVENT_READ, each)
    choose, times, free = random.Random(sending.seed), list[float](), list(connections)
    waiting: dict[socket.socket, tuple[float, int]] = {}
    due = time.monotonic()
    ends = due + sending.seconds
    while waiting or due < ends:
        now = time.monotonic()
        while free and due <= now and due < ends:
            connection = free.pop()
            waiting[connection] = now if sending.one_by_one else due, stolen_ticks()
            connection.sendall(request)
            due += choose.expovariate(sending.rate)
        idle_s = max(0.0, due - now) if free and due < ends else 1.0
        for key, _ in selector.select(idle_s):
            read_response(key.data)
            answered = time.monotonic()
            since, stolen = waiting.pop(key.data)
            if stolen == stolen_ticks():
                times.append(answered - since)
            free.append(key.data)
    return times


def explain_always(port: int, cores: set[int], request: bytes, pipe: Connection) -> None:
    """Send explanations without a pause from one message of `pipe` to the next; their times go back."""
    os.sched_setaffinity(0, cores)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while True:
            pipe.recv()
            times = []
            while not pipe.poll():
                began = time.monotonic()
                connection.sendall(request)
                body = read_response(connection)
                times.append(time.monotonic() - began)
                found = json.loads(body)["explanations"][0]
                assert found["complete"], found
            pipe.recv()
            pipe.send(times)


def until_closed(target: Callable[..., None], *arguments: object) -> None:
    """Run `target` until the other end of its pipe is closed."""
    with contextlib.suppress(EOFError):
        target(*arguments)


def start(target: Callable[..., None], *arguments: object) -> Connection:
    """Start `target` in a process of its own, and return the end of its pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    context.Process(target=until_closed, args=(target, *arguments, other), daemon=True).start()
    return pipe


def capacity(port: int, request: bytes) -> float:
    """Return how many predictions a second one connection gets."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        best = 0.0
        for _ in range(4):
            began, count = time.monotonic(), 0
            while time.monotonic() - began < 0.5:
                connection.sendall(request)
                read_response(connection)
                count += 1
            best = max(best, count / (time.monotonic() - began))
    return best


def report_latency(server: int, port: int, options: argparse.Namespace) -> None:
    """Print p50 and p99 of predictions alone and beside explanations."""
    rows = np.random.default_rng(0).random((1, 1, 8, 8)).tolist()
    body = json.dumps({"inputs": rows}).encode()
    predict = request_of(f"/predict/{MODEL}", body)
    explain = request_of(f"/explain/{MODEL}?passes={PERTURBATIONS + 2}", body)
    rate = options.per_s or options.share * capacity(port, predict)
    predictions = start(predict_always, port, options.client_cores, predict)
    explanations = start(explain_always, port, options.client_cores, explain)

    def run(is_beside: bool, seconds: float, seed: int) -> Round:
        before = cpu_s(server)
        if is_beside:
            explanations.send("begin")
        predictions.send(Sending(seconds, rate, seed, options.one_by_one))
        times = predictions.recv()
        used = cpu_s(server) - before
        made = []
        if is_beside:
            explanations.send("end")
            made = explanations.recv()
        return Round(times, made, used)

    run(False, 1.0, 0)
    run(True, 1.0, 0)
    rounds: dict[bool, list[Round]] = {False: [], True: []}
    for number in range(options.rounds):
        for is_beside in (False, True) if number % 2 else (True, False):
            rounds[is_beside].append(run(is_beside, options.seconds, number))
    print_rounds({"alone": rounds[False], "beside": rounds[True]}, rate, options)
    made = [seconds for each in rounds[True] for seconds in each.explanations]
    print(f"{len(made)} explanations took {1000 * statistics.median(made):.0f} ms each")


def print_rounds(kinds: Mapping[str, list[Round]], rate: float, options: argparse.Namespace) -> None:
    """Print a table of two kinds of rounds, and the ratios of the second kind to the first one."""
    print(f"{rate:.0f} predictions a second, {options.rounds} pairs of rounds of {options.seconds:g} s")
    print(f"{'':8} {'p50 ms':>8} {'p99 ms':>8} {'CPU us':>8}")
    for kind, found in kinds.items():
        p50, p99 = (
            1000 * statistics.median(percentile(each.times, part) for each in found) for part in (0.5, 0.99)
        )
        cpu_us = 1e6 * statistics.median(each.cpu_s / len(each.times) for each in found)
        print(f"{kind:<8} {p50:8.3f} {p99:8.3f} {cpu_us:8.0f}")
    (first, without), (second, added) = kinds.items()
    for part in (0.5, 0.99):
        ratios = [
            percentile(more.times, part) / percentile(less.times, part)
            for less, more in zip(without, added, strict=True)
        ]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"p{100 * part:.0f} {second} / {first}: {median:.3f}, quartiles {low:.3f} and {high:.3f}")
    print_pooled([each.times for each in without], [each.times for each in added])


def cores_of(text: str) -> set[int]:
    """Return the cores that a text such as `0,1` names."""
    return {int(part) for part in text.split(",")}


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path, nargs="?", default=Path("models"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--per-s", type=float, default=0.0)
    parser.add_argument("--one-by-one", action="store_true", help="one connection, timed from the sending")
    first, others = share_cores(argparse.Namespace(one_core=False))
    parser.add_argument("--server-cores", type=cores_of, default=others)
    parser.add_argument("--client-cores", type=cores_of, default=first)
    parser.add_argument("--serve", default="", help="more flags of inferpool serve, as one text")
    parser.add_argument("--skip-costs", action="store_true")
    options = parser.parse_args()
    print("$", shlex.join(("scripts/bench", "explain", *sys.argv[1:])), flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--log-level", "error", *shlex.split(options.serve)]
    command = [sys.executable, "-m", "inferpool", "serve", str(options.repository), *flags]
    os.sched_setaffinity(0, options.server_cores)
    server = subprocess.Popen(command)
    os.sched_setaffinity(0, options.client_cores)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            Admin(port).await_ready(server)
            if not options.skip_costs:
                report_costs(server.pid, client)
        report_latency(server.pid, port, options)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
