"""Measures what the Python client costs beside httpx alone, in CPU time of the client's process.

    python benchmarks/client.py [--requests N] [--rounds N]

Both send the same arrays in the binary form of the Open Inference Protocol over one connection each. `httpx`
is what a careful programmer writes with it: the JSON header and `tobytes`, one `post`, `json.loads` of the
header and `np.frombuffer`, without compression, which the client does not ask for either. A round asks each
in turn; the ratio of a round compares its two, and the figure is the median of the rounds. CPU time is the
process's own, so a busy machine changes it little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from inferpool import AsyncClient, Client

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.onnx_models import write_identity
from tests.server import Server

LENGTH = "Inference-Header-Content-Length"
SHAPES = {"one row of 10 numbers": (1, 10), "an array of 1 MB": (64, 4096)}


def encode(array: np.ndarray) -> tuple[bytes, dict[str, str]]:
    data = array.tobytes()
    header = json.dumps({
        "inputs": [{
            "name": "x0", "datatype": "FP32", "shape": array.shape,
            "parameters": {"binary_data_size": len(data)},
        }],
        "parameters": {"binary_data_output": True},
    }).encode()  # fmt: skip
    return header + data, {
        LENGTH: str(len(header)),
        "Content-Type": "application/octet-stream",
        "Accept-Encoding": "identity",
    }


def decode(response: httpx.Response) -> np.ndarray:
    response.raise_for_status()
    length, content = int(response.headers[LENGTH]), response.content
    output = json.loads(content[:length])["outputs"][0]
    return np.frombuffer(content, np.float32, offset=length).reshape(output["shape"])


def cpu_us(call: Callable[[], object], requests: int) -> float:
    """Return the CPU time of a call in microseconds, the mean of `requests` calls."""
    began = time.process_time()
    for _ in range(requests):
        call()
    return 1e6 * (time.process_time() - began) / requests


def report(kind: str, name: str, found: list[tuple[float, float]]) -> None:
    ours, theirs = (statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(mine / other for mine, other in found)
    print(f"{kind:<12} {name:<22} client {ours:7.0f} µs   httpx {theirs:7.0f} µs   ratio {ratio:.2f}")


def compare(url: str, requests: int, rounds: int) -> None:
    path = f"{url}/v2/models/echo/infer"
    with Client(url) as client, httpx.Client(timeout=60) as http:
        for name, shape in SHAPES.items():
            array = np.random.default_rng(0).random(shape, np.float32)

            def alone(array: np.ndarray = array) -> object:
                content, headers = encode(array)
                return decode(http.post(path, content=content, headers=headers))

            def ours(array: np.ndarray = array) -> object:
                return client.predict("echo", array).array

            np.testing.assert_array_equal(ours(), alone())
            report("Client", name, [(cpu_us(ours, requests), cpu_us(alone, requests)) for _ in range(rounds)])


async def compare_async(url: str, requests: int, rounds: int) -> None:
    path = f"{url}/v2/models/echo/infer"

    async def cpu(call: Callable[[], Coroutine[Any, Any, object]]) -> float:
        began = time.process_time()
        for _ in range(requests):
            await call()
        return 1e6 * (time.process_time() - began) / requests

    async with AsyncClient(url) as client, httpx.AsyncClient(timeout=60) as http:
        for name, shape in SHAPES.items():
            array = np.random.default_rng(0).random(shape, np.float32)

            async def alone(array: np.ndarray = array) -> object:
                content, headers = encode(array)
                return decode(await http.post(path, content=content, headers=headers))

            async def ours(array: np.ndarray = array) -> object:
                return (await client.predict("echo", array)).array

            np.testing.assert_array_equal(await ours(), await alone())
            report("AsyncClient", name, [(await cpu(ours), await cpu(alone)) for _ in range(rounds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_identity(Path(folder), "echo", ["FP32"])
        server = Server(Path(folder), ("--measure-ms", "20"))
        try:
            server.wait_loaded()
            compare(server.url, options.requests, options.rounds)
            asyncio.run(compare_async(server.url, options.requests, options.rounds))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
