"""Measures p99 and CPU time of requests for one model while a large one is loaded, in interleaved rounds.

    python benchmarks/load_beside.py [--serve="--engine process"] [--rounds 6] [--seconds 10]

starts a server with a small model, and sends it requests at a fixed rate. In every second round new versions
of a large model are loaded meanwhile, whose weights are others each time, so that each is proven and measured
anew. It prints p50 and p99 of both kinds of rounds and of each phase of the loads, and the CPU time of the
threads of usual priority, which serve.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import onnx
from onnx import helper, numpy_helper

SIDE = 2048
CLASSES = 16
LAYER_BYTES = 4 * SIDE * SIDE


class Round(NamedTuple):
    """A round: the moment and the time of each request, and what the server did meanwhile.

    Attributes:
        times: for each request the moment at which it was due, and the seconds until its answer.
        usual_s: CPU seconds of the threads of usual priority that live as long as the round.
        load_s: how long each load took.
    """

    times: list[tuple[float, float]]
    usual_s: float
    load_s: list[float]


def write_mlp(folder: Path, layers: int, side: int, seed: int) -> None:
    """Write a chain of matrix products with random weights."""
    random = np.random.default_rng(seed)
    nodes, weights, name = [], [], "x"
    for number in range(layers):
        last = number == layers - 1
        shape = (side, CLASSES if last else side)
        matrix = (random.standard_normal(shape, np.float32) / np.sqrt(side)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{number}"))
        target = "y" if last else f"h{number}"
        nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [target if last else f"{target}m"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"{target}m"], [target]))
        name = target
    graph = helper.make_graph(
        nodes, "mlp",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", side])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", CLASSES])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    made = folder.parent / f".{folder.name}"
    made.mkdir(parents=True)
    onnx.save(model, str(made / "model.onnx"))
    made.rename(folder)


def threads_cpu(server: int) -> dict[int, float]:
    """CPU seconds of each thread of usual priority in the server's processes."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(entry.parent.name)] = int(_fields(entry)[1])
    processes = {server}
    for _ in range(4):
        processes |= {child for child, parent in parents.items() if parent in processes}
    found: dict[int, float] = {}
    for process in processes:
        for entry in Path(f"/proc/{process}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                fields = _fields(entry)
                if int(fields[16]) <= 0:
                    ticks = int(fields[11]) + int(fields[12])
                    found[int(entry.parent.name)] = ticks / os.sysconf("SC_CLK_TCK")
    return found


def _fields(stat: Path) -> list[str]:
    return stat.read_text().rpartition(")")[2].split()


def percentile(values: Sequence[float], part: float) -> float:
    """The value that `part` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def ask(port: int, body: bytes, rate: float, over: threading.Event, times: list[tuple[float, float]]) -> None:
    """Send `rate` requests a second; each time counts from the moment at which the request was due."""
    request = b"POST /predict/small HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        due = time.monotonic()
        while not over.is_set():
            due += 1 / rate
            time.sleep(max(0.0, due - time.monotonic()))
            connection.sendall(request)
            reply = connection.recv(65_536)
            assert reply.startswith(b"HTTP/1.1 200"), reply
            times.append((due, time.monotonic() - due))


def run_round(
    server: int, port: int, body: bytes, rate: float, length_s: float, load: Callable[[], None] | None
) -> Round:
    """Send requests for so long; with `load`, call it again and again meanwhile."""
    over, times, loads = threading.Event(), list[tuple[float, float]](), list[float]()
    client = threading.Thread(target=ask, args=(port, body, rate, over, times))
    before, began = threads_cpu(server), time.monotonic()
    client.start()
    try:
        if load is None:
            time.sleep(length_s)
        else:
            while not loads or time.monotonic() - began < length_s:
                load_began = time.monotonic()
                load()
                loads.append(time.monotonic() - load_began)
        after = threads_cpu(server)
    finally:
        over.set()
        client.join()
    return Round(times, sum(after[thread] - before[thread] for thread in after.keys() & before.keys()), loads)


def main() -> int:
    """Run the rounds and print what they give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", default="--engine process", help="further flags of the server")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--small-layers", type=int, default=4)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        os.nice(19)
        layers = max(2, options.megabytes * 10**6 // LAYER_BYTES)
        write_mlp(options.write, layers, SIDE, int(options.write.name))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "models")
        write_mlp(folder / "small" / "1", options.small_layers, 256, 0)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "inferpool", "serve", str(folder), "--port", str(port), "--admin-routes",
            "on",
            "--cache-dir", str(Path(name, "cache")), *shlex.split(options.serve),
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                measure(process.pid, port, folder, options)
            finally:
                process.terminate()
    return 0


def measure(server: int, port: int, folder: Path, options: argparse.Namespace) -> None:
    """Run the rounds against a server, and print the result."""
    phases: list[tuple[float, str]] = [(0.0, "")]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as admin:
        await_ready(admin)
        versions = iter(range(1, 10_000))

        def load() -> None:
            version = next(versions)
            phases.append((time.monotonic(), "none"))
            subprocess.run([sys.executable, __file__, "--write", str(folder / "large" / str(version)),
                            "--megabytes", str(options.megabytes)], check=True)  # fmt: skip
            job = admin.post("/models/large/load", json={"version": version}).json()
            while job["state"] == "running":
                phases.append((time.monotonic(), job["phase"] or "waiting"))
                time.sleep(0.02)
                job = admin.get(f"/jobs/{job['id']}").json()
            if job["state"] != "done":
                raise RuntimeError(job["reason"])
            phases.append((time.monotonic(), "unload"))
            admin.post("/v2/repository/models/large/unload").raise_for_status()
            phases.append((time.monotonic(), "none"))

        body = json.dumps({"inputs": [[0.5] * 256]}).encode()
        run_round(server, port, body, options.rate, 1.0, None)
        rounds: dict[bool, list[Round]] = {False: [], True: []}
        for number in range(2 * options.rounds):
            is_beside = number % 2 == 1
            found = run_round(server, port, body, options.rate, options.seconds, load if is_beside else None)
            rounds[is_beside].append(found)
    for is_beside, found_rounds in rounds.items():
        times = [time for each in found_rounds for time in each.times]
        by_phase: dict[str, list[float]] = {}
        for due, seconds in times:
            phase = phases[bisect.bisect(phases, (due, "~")) - 1][1]
            by_phase.setdefault(phase if is_beside else "", []).append(seconds)
        usual_ms = 1000 * sum(each.usual_s for each in found_rounds) / len(times)
        p99s = ", ".join(
            f"{1000 * percentile([s for _, s in each.times], 0.99):.1f}" for each in found_rounds
        )
        print(
            f"{'beside loads' if is_beside else 'alone'}: CPU of serving threads {usual_ms:.3f} ms a request"
        )
        print(f"  p99 of each round in ms: {p99s}")
        for phase, values in {"all": [seconds for _, seconds in times], **by_phase}.items():
            if phase:
                print(
                    f"  {phase:<14} {len(values):6d} requests  p50 {1000 * percentile(values, 0.5):8.2f} ms"
                    f"  p99 {1000 * percentile(values, 0.99):8.2f} ms  longest {1000 * max(values):8.2f} ms"
                )
        load_s = [seconds for each in found_rounds for seconds in each.load_s]
        if load_s:
            print(f"  {len(load_s)} loads, {sum(load_s) / len(load_s):.1f} s each")


def await_ready(admin: httpx.Client) -> None:
    """Wait until the server is ready."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            if admin.get("/health/ready").status_code == 200:
                return
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
