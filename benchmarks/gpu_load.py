"""Load for `benchmarks/gpu.py`: `/v2` requests with binary tensors from processes of their own.

Each connection is a thread that sends one prepared request after the other. Sockets are read and written
without the interpreter lock, so a few processes keep a server busy.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import socket
import statistics
import threading
import time
from typing import Any, Final, NamedTuple

import numpy as np

_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: (\d+)")
_DATATYPES: Final = {"uint8": "UINT8", "int64": "INT64", "float16": "FP16"}


class Answered(NamedTuple):
    """The clients' figures: requests answered a second, and their durations in milliseconds."""

    requests_s: float
    median_ms: float
    p99_ms: float
    longest_ms: float


def request(model: str, rows: np.ndarray[Any, Any]) -> bytes:
    """An HTTP request with `rows` as the binary tensor `x`, which asks for a binary answer."""
    tensor = {
        "name": "x",
        "shape": list(rows.shape),
        "datatype": _DATATYPES[str(rows.dtype)],
        "parameters": {"binary_data_size": rows.nbytes},
    }
    output = {"name": "y", "parameters": {"binary_data": True}}
    header = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    length = len(header) + rows.nbytes
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode() + header + rows.tobytes()  # fmt: skip


def load(port: int, sent: bytes, processes: int, connections: int, seconds: float) -> Answered:
    """Send `sent` over `processes` × `connections` connections for `seconds`, after a warm-up."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes)
    results: Any = context.Queue()
    workers = [
        context.Process(target=_work, args=(port, sent, connections, seconds, ready, results), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    durations: list[float] = []
    for _ in workers:
        found, fault = results.get(timeout=seconds * 3 + 120)
        if fault:
            raise RuntimeError(fault)
        durations += found
    for worker in workers:
        worker.join()
    if len(durations) < 2:
        raise RuntimeError(f"{len(durations)} answers in {seconds} s")
    cuts = statistics.quantiles(durations, n=100)
    return Answered(len(durations) / seconds, 1000 * cuts[49], 1000 * cuts[98], 1000 * max(durations))


def _work(port: int, sent: bytes, connections: int, seconds: float, ready: Any, results: Any) -> None:
    durations: list[list[float]] = [[] for _ in range(connections)]
    faults: list[str] = []
    ready.wait()
    begins = time.perf_counter() + seconds / 4
    ends = begins + seconds

    def connection(number: int) -> None:
        try:
            with socket.create_connection(("127.0.0.1", port)) as opened:
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while (began := time.perf_counter()) < ends:
                    opened.sendall(sent)
                    _receive(opened)
                    done = time.perf_counter()
                    if begins <= done < ends:
                        durations[number].append(done - began)
        except (OSError, RuntimeError) as error:
            faults.append(str(error))

    threads = [threading.Thread(target=connection, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(([duration for found in durations for duration in found], "; ".join(faults[:1])))


def _receive(opened: socket.socket) -> None:
    """Read one answer to its end; raises RuntimeError unless its status is 200."""
    got = bytearray()
    while (end := got.find(b"\r\n\r\n")) < 0:
        more = opened.recv(1 << 16)
        if not more:
            raise RuntimeError("the server hung up")
        got += more
    length = _LENGTH.search(got, 0, end)
    missing = end + 4 + int(length[1] if length else 0) - len(got)
    while missing > 0:
        more = opened.recv(min(missing, 1 << 20))
        if not more:
            raise RuntimeError("the server hung up")
        got += more
        missing -= len(more)
    if not got.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(bytes(got[:500]).decode(errors="replace"))
