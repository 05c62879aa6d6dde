"""Measures the cost of wrong keys, and how much they slow good requests.

    python -m benchmarks.wrong_keys models --model digits --body body.json [--fresh] [--serve="..."]

starts a server with one web process and sends it requests with a wrong key, one at a time on each of 32
connections: first as many as the server refuses, then so many a second beside a small load of good requests.
It prints the refusals a second and for a second of CPU time of the server, and p50 and p99 of the good
requests without and with the flood. `--fresh` makes up another key for each request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import selectors
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from inferpool.http.access.key_file import append_key, new_key

from benchmarks.fairness import Load, Outcome, run_loads, wait_ready
from benchmarks.percentiles import percentile

PORT = 8199
CONNECTIONS = 32


def flood(path: str, body: bytes, per_s: float, fresh: bool, pipe: Connection) -> None:
    """Send requests with a wrong key until something comes by `pipe`, at most `per_s` a second.

    Then the refusals go back by the pipe, and the seconds that they took.
    """
    fields = f"Host: a\r\nContent-Length: {len(body)}\r\nAuthorization: Bearer inferpool_"
    start, end = f"POST {path} HTTP/1.1\r\n{fields}".encode(), b"\r\n\r\n" + body
    key = b"abcdefgh_" + b"x" * 43
    selector = selectors.DefaultSelector()
    idle = [socket.create_connection(("127.0.0.1", PORT)) for _ in range(CONNECTIONS)]
    for each in idle:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(each, selectors.EVENT_READ, each)
    sent = refused = 0
    began = time.monotonic()
    while sent % 64 or not pipe.poll():
        allowed = (time.monotonic() - began) * per_s
        while idle and sent < allowed:
            sent += 1
            idle.pop().send(start + (b"%052d" % sent if fresh else key) + end)
        for ready, _ in selector.select(0 if idle else 0.1):
            answer = ready.data.recv(4096)
            assert answer.startswith(b"HTTP/1.1 401"), answer
            refused += 1
            idle.append(ready.data)
    pipe.send((refused, time.monotonic() - began))


class Flood:
    """A flood from another process; begins at once."""

    def __init__(self, path: str, body: bytes, per_s: float, fresh: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = (path, body, per_s, fresh, other)
        context.Process(target=flood, args=arguments, daemon=True).start()

    def end(self) -> tuple[int, float]:
        """End the flood; returns how many requests were refused, and in how many seconds."""
        self._pipe.send("end")
        refused, seconds = self._pipe.recv()
        return refused, seconds


def cpu_s(server: int) -> float:
    """Return the CPU seconds that the process `server` and its children have used."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if server in (int(stat.parent.name), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def report(name: str, outcome: Outcome) -> None:
    """Print the times of the good requests."""
    p50, p99 = (1000 * percentile(outcome.seconds, part) for part in (0.5, 0.99))
    wrong = outcome.statuses.total() - outcome.statuses[200]
    print(f"{name:<34} p50 {p50:6.2f} ms, p99 {p99:6.2f} ms, {wrong} not answered", flush=True)


def main() -> None:
    """Run the measurement, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--body", type=Path, required=True, help="a file with the body of a request")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--good-per-s", type=float, default=200.0)
    parser.add_argument("--wrong-per-s", type=float, default=10_000.0)
    parser.add_argument("--fresh", action="store_true", help="another wrong key with each request")
    parser.add_argument("--serve", default="", help="more flags of inferpool serve, as one text")
    arguments = parser.parse_args()
    body, path, seconds = arguments.body.read_bytes(), f"/predict/{arguments.model}", arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        key, record = new_key("one", ["predict"])
        append_key(file, record)
        flags = ["--port", str(PORT), "--keys-file", str(file), "--log-level", "error"]
        command = [sys.executable, "-m", "inferpool", "serve", str(arguments.repository), *flags]
        server = subprocess.Popen([*command, *shlex.split(arguments.serve)])
        try:
            wait_ready(arguments.model)
            before = cpu_s(server.pid)
            running = Flood(path, body, 1e9, arguments.fresh)
            time.sleep(seconds)
            refused, took_s = running.end()
            each_us = 1e6 * (cpu_s(server.pid) - before) / refused
            print(f"wrong keys: {refused / took_s:.0f} refused a second, {each_us:.1f} us CPU each")
            load = Load("one", key, arguments.good_per_s, 16)
            alone = asyncio.run(run_loads(PORT, body, [load], seconds, path))["one"]
            report("good requests alone", alone)
            running = Flood(path, body, arguments.wrong_per_s, arguments.fresh)
            beside = asyncio.run(run_loads(PORT, body, [load], seconds, path))["one"]
            refused, took_s = running.end()
            report(f"beside {refused / took_s:.0f} wrong keys a second", beside)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
