"""Measures what a response cache costs requests that it cannot answer, in interleaved rounds.

    python benchmarks/cache_misses.py [--connections 1,64] [--rounds 20] [--requests 4000]
    python benchmarks/cache_misses.py --callgrind [--rounds 3] [--requests 640]

starts one server with the model `digits` twice, with and without a cache, and sends each of them rows that
never come again. The first form prints the CPU time of all of the server's threads for a request, and the
median of the ratios of the rounds. The second one runs the server in valgrind's callgrind and prints the
instructions of a request, which other programs on the machine do not change. Every round sends one request a
connection, and then waits for all answers; in callgrind the server stands still while they are sent, so
batches always are of the same size.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
MODELS: Final = ("digits", "digits-cached")
_STARTED_S: Final = 240.0


def write_models(folder: Path) -> None:
    """Copy `digits` twice, the second time with a cache."""
    for name in MODELS:
        shutil.copytree(ROOT / "models" / "digits", folder / name)
    with (folder / MODELS[1] / "model.toml").open("a") as file:
        file.write("\n[cache]\nenabled = true\n")


def requests_to(model: str, count: int, seed: int) -> list[bytes]:
    """Return `count` requests with one row each; no row comes twice."""
    source = random.Random(seed)
    requests = []
    for _ in range(count):
        numbers = [source.randrange(17) / 16 for _ in range(64)]
        rows = [numbers[start : start + 8] for start in range(0, 64, 8)]
        body = b'{"inputs":%b}' % str([[rows]]).replace(" ", "").encode()
        head = f"POST /predict/{model} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    return requests


class Client:
    """Sends requests over `connections`, one at a time on each.

    Attributes:
        server: stands still while requests are sent, if it is the number of a process.
    """

    def __init__(self, port: int, connections: int, server: int | None) -> None:
        self.connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        self.server = server

    def send(self, requests: Sequence[bytes]) -> None:
        """Send all `requests`; raises RuntimeError if one fails."""
        step = len(self.connections)
        for start in range(0, len(requests), step):
            if self.server is not None and step > 1:
                os.kill(self.server, signal.SIGSTOP)
            pairs = list(zip(self.connections, requests[start : start + step], strict=False))
            for connection, request in pairs:
                connection.sendall(request)
            if self.server is not None and step > 1:
                os.kill(self.server, signal.SIGCONT)
            for connection, _ in pairs:
                answer = connection.recv(65_536)
                if not answer.startswith(b"HTTP/1.1 200") or b"; hit" in answer:
                    raise RuntimeError(answer[:500].decode())

    def close(self) -> None:
        """Close the connections."""
        for connection in self.connections:
            connection.close()


def cpu_s(process: int) -> float:
    """Return the CPU seconds of all threads of a process so far, by the scheduler's count."""
    tasks = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def instructions(process: int, folder: Path) -> float:
    """Return the instructions since the last call, as callgrind counted them."""
    before = set(folder.glob("callgrind.out.*"))
    subprocess.run(["callgrind_control", "-d", str(process)], check=True, stdout=subprocess.DEVNULL)
    while True:
        found = [file.read_text() for file in set(folder.glob("callgrind.out.*")) - before]
        totals = [line for text in found for line in text.splitlines() if line.startswith("totals:")]
        if totals:
            return sum(float(line.split()[1]) for line in totals)


def measure(
    port: int, connections: int, rounds: int, count: int, server: int | None, cost: Callable[[], float]
) -> list[tuple[float, float]]:
    """Return what a request cost in each round, without and with a cache; `cost` restarts at each call."""
    client = Client(port, connections, server)
    pairs = []
    for number in range(-1, rounds):
        found = {}
        for model in MODELS[:: 1 if number % 2 else -1]:
            # The same rows for both, because numbers are not all of the same length.
            batch = requests_to(model, count, 1000 * connections + number + 1)
            cost()
            client.send(batch)
            found[model] = cost() / count
        if number >= 0:  # the first round fills caches
            pairs.append((found[MODELS[0]], found[MODELS[1]]))
    client.close()
    return pairs


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server is ready; raises TimeoutError if it has ended, or is not ready in time."""
    until = time.monotonic() + _STARTED_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=60) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server was not ready in time")


def main() -> int:
    """Run the rounds and print what they give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--connections", default="1,64")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=4000, help="for each model in each round")
    parser.add_argument("--callgrind", action="store_true", help="count instructions in place of CPU time")
    parser.add_argument("--keep", type=Path, help="copy what callgrind has written into this folder")
    parser.add_argument("--serve", default="", help="further flags of the server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder / "models")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "inferpool", "serve", str(folder / "models"), "--port", str(port),
            "--engine", "in-process", "--web-processes", "1", *shlex.split(options.serve),
        ]  # fmt: skip
        if options.callgrind:
            output = f"--callgrind-out-file={folder}/callgrind.out.%p"
            command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", output, *command]
        log = folder / "log"
        with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
            try:
                wait_until_ready(port, process)
                if options.callgrind:
                    subprocess.run(["callgrind_control", "-i", "on", str(process.pid)], check=True)
                for text in options.connections.split(","):
                    run(int(text), options, process.pid, port, folder)
            except (RuntimeError, OSError):
                print(log.read_text()[-3000:], file=sys.stderr)
                raise
            finally:
                process.terminate()
        if options.keep is not None:
            for file in folder.glob("callgrind.out.*"):
                shutil.copy(file, options.keep)
    return 0


def run(connections: int, options: argparse.Namespace, process: int, port: int, folder: Path) -> None:
    """Measure with so many connections, and print the medians."""
    if options.callgrind:
        pairs = measure(
            port,
            connections,
            options.rounds,
            options.requests,
            process,
            lambda: instructions(process, folder),
        )
        unit, scale = "instructions", 1.0
    else:
        last = cpu_s(process)

        def cost() -> float:
            nonlocal last
            before, last = last, cpu_s(process)
            return last - before

        pairs = measure(port, connections, options.rounds, options.requests, None, cost)
        unit, scale = "µs of CPU", 1e6
    without = statistics.median(pair[0] for pair in pairs) * scale
    with_cache = statistics.median(pair[1] for pair in pairs) * scale
    ratios = sorted(pair[1] / pair[0] - 1 for pair in pairs)
    print(
        f"{connections:3} connections: {without:.1f} {unit} a request without a cache, {with_cache:.1f} with"
        f" one; medians of {len(pairs)} rounds; ratios: median {100 * statistics.median(ratios):+.2f} %,"
        f" quartiles {100 * ratios[len(ratios) // 4]:+.2f} and {100 * ratios[3 * len(ratios) // 4]:+.2f} %",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
