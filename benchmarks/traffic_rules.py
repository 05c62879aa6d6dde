"""Measures the CPU time that a canary and a shadow add to a small request, in interleaved rounds.

    python benchmarks/traffic_rules.py [--rounds 10] [--requests 4000] [--serve="--engine in-process"]

starts a server with two versions of a small model, sends requests over a few connections, and sets other
rules before each round: none, a canary with a share of 50 %, one by a header, a shadow that gets almost none,
and one that gets a copy of each request. It prints the CPU time of all of the server's threads for a request,
and the median of the differences from the rounds without a rule.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx
import onnx
from onnx import helper

CONNECTIONS: Final = 8
RULES: Final[dict[str, dict[str, Any]]] = {
    "no rule": {},
    "canary": {"canary": {"version": 2, "share": 0.5, "requests": 0}},
    "canary by a header": {"canary": {"version": 2, "share": 0.5, "by": "header:x-user", "requests": 0}},
    "shadow without copies": {"shadow": {"version": 2, "share": 1e-6}},
    "shadow, all copied": {"shadow": {"version": 2, "share": 1.0}},
}


def write_model(folder: Path) -> None:
    """Write a model that returns what it gets."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "same",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", 4])],
    )  # fmt: skip
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))


def cpu_s(process: int) -> float:
    """The CPU seconds of all threads of a process and its children so far, by the scheduler's count."""
    total = 0
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {process}
    for _ in range(3):
        family |= {child for child, parent in parents.items() if parent in family}
    for member in family:
        for schedstat in Path(f"/proc/{member}/task").glob("*/schedstat"):
            try:
                total += int(schedstat.read_text().split()[0])
            except OSError:
                continue
    return total / 1e9


def send(port: int, requests: int) -> None:
    """Send `requests` predictions over a few connections, one under way on each."""
    body = b'{"inputs":[[1,2,3,4]]}'
    head = b"POST /predict/same HTTP/1.1\r\nHost: a\r\nX-User: somebody\r\n"
    request = b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body)
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    for _ in range(requests // CONNECTIONS):
        for connection in connections:
            connection.sendall(request)
        for connection in connections:
            reply = connection.recv(65_536)
            if not reply.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(reply[:500].decode())
    for connection in connections:
        connection.close()


def main() -> int:
    """Run the rounds and print what they give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--serve", default="--engine in-process", help="further flags of the server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "models")
        for version in (1, 2):
            write_model(folder / "same" / str(version))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "inferpool", "serve", str(folder), "--port", str(port), "--admin-routes",
            "on", *shlex.split(options.serve),
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                costs = measure(process.pid, port, options.rounds, options.requests)
            finally:
                process.terminate()
    for rule, values in costs.items():
        extra = [value - plain for value, plain in zip(values, costs["no rule"], strict=True)]
        print(
            f"{rule:<22} {statistics.median(values):7.1f} µs a request  {statistics.median(extra):+6.1f} µs"
        )
    return 0


def measure(process: int, port: int, rounds: int, requests: int) -> dict[str, list[float]]:
    """The CPU time of a request in each round, in microseconds, by the rule."""
    costs: dict[str, list[float]] = {rule: [] for rule in RULES}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as admin:
        while True:
            try:
                if admin.get("/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        admin.put("/models/same/labels/stable", json={"version": 1}).raise_for_status()
        send(port, requests)
        for number in range(rounds):
            for rule, traffic in list(RULES.items())[:: 1 if number % 2 else -1]:
                admin.delete("/models/same/traffic").raise_for_status()
                if traffic:
                    admin.put("/models/same/traffic", json=traffic).raise_for_status()
                send(port, 200)
                before = cpu_s(process)
                send(port, requests)
                costs[rule].append((cpu_s(process) - before) / requests * 1e6)
    return costs


if __name__ == "__main__":
    sys.exit(main())
