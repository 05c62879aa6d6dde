"""Measures the CPU time of a request, by the format of its body: `scripts/bench formats`.

A server of this checkout runs in a process of its own and gets one request after the other over one
connection. The cost is the user and system CPU time of the server's process tree for `--requests`
requests, divided by their number. Figures are medians of `--rounds` rounds, in which the formats take
turns. The models do next to nothing: they compute the mean of a row of 64 floats, or of each channel of a
3×224×224 image. The last line of each table is a request without a body, `GET /v2/health/live`, which the
web framework answers.

The 602,112 bytes of a binary image are copied at most twice in Python.
`inferpool.http.predict.body_buffer` copies them into an aligned body, of which the tensor is a view.
`inferpool.pool.batch` copies them into the batch, unless the entry is alone in it. The kernel's copy from
the socket comes before.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from PIL import Image

ROOT = Path(__file__).parents[1]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SIDE = 224
ROW = np.random.default_rng(0).random((1, 64)).round(5).astype(np.float32)
IMAGE = np.random.default_rng(1).random((1, 3, SIDE, SIDE)).round(5).astype(np.float32)


class Request(NamedTuple):
    """One request to repeat."""

    name: str
    path: str
    body: bytes
    headers: Mapping[str, str]


def write_mean(folder: Path, name: str, shape: list[int], axes: list[int]) -> None:
    """Write a model that computes the mean of each row over `axes`."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["y"], axes=axes, keepdims=0)],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    file = folder / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())


def write_repository(folder: Path) -> None:
    write_mean(folder, "row", [64], [1])
    write_mean(folder, "image", [3, SIDE, SIDE], [2, 3])
    (folder / "image" / "model.toml").write_text('[image]\nmode = "rgb"\n')


def binary(model: str, rows: np.ndarray, name: str) -> Request:
    parameters = {"binary_data_size": rows.nbytes}
    tensor = {"name": "x", "datatype": "FP32", "shape": rows.shape, "parameters": parameters}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    return Request(name, f"/v2/models/{model}/infer", header + rows.tobytes(), headers)


def npy(rows: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, rows)
    return stream.getvalue()


def photo() -> bytes:
    """Return a picture that compresses like a photograph: smooth, with some noise."""
    across, down = np.meshgrid(np.linspace(0, 6, SIDE), np.linspace(0, 5, SIDE))
    noise = np.random.default_rng(2).normal(0, 6, (SIDE, SIDE, 3))
    waves = np.stack([np.sin(across), np.cos(down), np.sin(across + down)], axis=-1)
    stream = io.BytesIO()
    Image.fromarray((128 + 90 * waves + noise).clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=85)
    return stream.getvalue()


def requests(model: str, rows: np.ndarray) -> list[Request]:
    values = [[float(f"{number:.5f}") for number in rows.reshape(-1)]]
    nested = np.array(values).reshape(rows.shape).tolist()
    tensor = {"name": "x", "datatype": "FP32", "shape": rows.shape, "data": values[0]}
    infer = f"/v2/models/{model}/infer"
    npy_type = {"Content-Type": "application/x-npy"}
    listed = [
        Request("JSON", f"/predict/{model}", json.dumps({"inputs": {"x": nested}}).encode(), {}),
        Request("`/v2` JSON", infer, json.dumps({"inputs": [tensor]}).encode(), {}),
        binary(model, rows, "`/v2` binary"),
        Request("`/v2` raw", infer, rows.tobytes(), {"Inference-Header-Content-Length": "0"}),
        Request("npy", f"/predict/{model}", npy(rows), {**npy_type, "Accept": "application/x-npy"}),
    ]
    if model == "image":
        listed.append(Request("JPEG", "/predict/image", photo(), {"Content-Type": "image/jpeg"}))
    return [*listed, Request("no model, no body", "/v2/health/live", b"", {})]


def cpu_s(root: int) -> float:
    """Return the CPU seconds of a process and its children, with all threads, since they started."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of a process, in parentheses, may contain anything.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    tree = {root}
    while grown := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return sum(ticks[pid] for pid in tree) / TICKS_PER_S


def ask(connection: http.client.HTTPConnection, request: Request, count: int) -> None:
    method = "POST" if request.body else "GET"
    for _ in range(count):
        connection.request(method, request.path, request.body or None, dict(request.headers))
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{request.name}: {answer.status} {body[:500]!r}")


def start(repository: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a server; return the process and its port once the models are loaded."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "service"), "INFERPOOL_LOG_FORMAT": "console"}
    command = [sys.executable, "-m", "inferpool", "serve", str(repository), "--port", "0"]
    server = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    port = 0
    for line in server.stderr:
        if found := re.search(r"listening on \S+:(\d+)", line):
            port = int(found[1])
        if re.search(r"ok: \d+ models", line):
            return server, port
    raise SystemExit("the server did not start")


def measure(port: int, root: int, listed: list[Request], count: int, rounds: int) -> dict[str, float]:
    """Return the median CPU microseconds of each request."""
    times: dict[str, list[float]] = {request.name: [] for request in listed}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for request in listed:
        ask(connection, request, count // 10)
    for _ in range(rounds):
        for request in listed:
            before = cpu_s(root)
            ask(connection, request, count)
            times[request.name].append((cpu_s(root) - before) / count * 1e6)
    connection.close()
    return {name: median(found) for name, found in times.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="rounds, at least 5 (default 5)")
    options.add_argument("--requests", type=int, default=1000, help="requests a round (default 1000)")
    given = options.parse_args()
    print(
        f"Python {platform.python_version()}, ONNX Runtime {onnxruntime.__version__}, {os.cpu_count()} cores;"
    )
    print(f"medians of {max(5, given.rounds)} rounds of {given.requests} requests, one at a time\n")
    with tempfile.TemporaryDirectory() as folder:
        write_repository(Path(folder))
        server, port = start(Path(folder))
        try:
            for model, rows, what in (("row", ROW, "64 floats"), ("image", IMAGE, "3×224×224 floats")):
                listed = requests(model, rows)
                found = measure(port, server.pid, listed, given.requests, max(5, given.rounds))
                print(f"| {what} | body, bytes | server CPU, µs a request |\n|---|---|---|")
                for request in listed:
                    print(f"| {request.name} | {len(request.body):,} | {found[request.name]:,.0f} |")
                print()
        finally:
            server.terminate()
            server.communicate()


if __name__ == "__main__":
    main()
