"""Measures the memory that a server gives back: after two models were loaded, and after large requests.

    python benchmarks/memory.py [--engine in-process|process] [--bodies N] [--body-mb MB]

The models are `digits` and two ResNet-50 with random weights, 98 MB each. The burst is of N requests to
`digits` at once. Memory is the private and shared memory of all processes of the server (PSS). Freed memory
goes back within seconds, so each figure is the least of the 30 seconds that follow.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.start import family, make_resnet
from tests.clients import Client, with_clients
from tests.server import ROOT, Server

MIB = 2**20
SETTLE_S = 30.0


def held_bytes(server: Server) -> int:
    """The proportional set size of all processes of `server`."""
    total = 0
    for process in family(server.process.pid):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def settled_bytes(server: Server) -> int:
    """The least memory in the next half minute."""
    deadline = time.monotonic() + SETTLE_S
    least = held_bytes(server)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        least = min(least, held_bytes(server))
    return least


def burst(server: Server, bodies: int, body: bytes) -> Counter[int]:
    """Post `body` from as many clients at once; the statuses of the answers."""
    statuses: Counter[int] = Counter()

    async def work(client: Client, number: int) -> None:
        reply = await client.post("/predict/digits", body, {"content-type": "application/x-npy"})
        statuses[reply.status] += 1

    asyncio.run(with_clients(server.port, bodies, work))
    return statuses


def serve(repository: Path, engine: str, measure: Callable[[Server], None]) -> None:
    """Start a server and measure it once its models are loaded."""
    server = Server(repository, ["--engine", engine, "--threads", "1"])
    try:
        server.wait_loaded()
        measure(server)
    finally:
        server.kill()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="in-process", choices=["in-process", "process"])
    parser.add_argument("--bodies", type=int, default=28)
    parser.add_argument("--body-mb", type=int, default=28)
    arguments = parser.parse_args()
    print("| memory of all processes | MiB |\n|---|---|")

    def row(what: str, size: int) -> None:
        print(f"| {what} | {size / MIB:.0f} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        three, digits = Path(folder, "three"), Path(folder, "digits")
        make_resnet(three / "a" / "1" / "model.onnx")
        shutil.copytree(three / "a", three / "b")
        for repository in (three, digits):
            shutil.copytree(ROOT / "models" / "digits", repository / "digits")
        serve(three, arguments.engine, lambda server: row("with two models of 98 MB", settled_bytes(server)))

        def send(server: Server) -> None:
            row("`digits`", settled_bytes(server))
            stream = io.BytesIO()
            np.save(stream, np.zeros((arguments.body_mb * 10**6 // 256, 1, 8, 8), np.float32))
            statuses = burst(server, arguments.bodies, stream.getvalue())
            said = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
            size = f"{arguments.bodies} bodies of {arguments.body_mb} MB"
            row(f"at the end of {size} ({said})", held_bytes(server))
            row("after that", settled_bytes(server))

        serve(digits, arguments.engine, send)


if __name__ == "__main__":
    main()
