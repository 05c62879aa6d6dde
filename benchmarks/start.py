"""Measures a start: until `models/`, a ResNet-50 and a model of 1.6 GB are ready, beside a plain session.

    python benchmarks/start.py [--rounds N] [--models NAME,...] [--engine in-process|process]

A plain session is a Python process that imports ONNX Runtime, loads the file by the same number of threads
and runs one row. Both take turns, in the same rounds. Each figure is the median over the rounds; the first
start of the server, which measures the model, is shown by itself. The load is what the session, or the
server, does for the model alone. Memory is the peak of the process that loads the model: its resident memory,
with the pages of files that it maps.

The models have random weights: a start reads all of them, and looks at none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.server import ROOT, Server

TICKS = os.sysconf("SC_CLK_TCK")
WIDE = 2048
PLAIN = """
import sys, time
import numpy, onnxruntime
began = time.perf_counter()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
[taken] = session.get_inputs()
shape = [size if isinstance(size, int) else 1 for size in taken.shape]
session.run(None, {taken.name: numpy.zeros(shape, numpy.float32)})
took = time.perf_counter() - began
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(took, peak)
"""


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds and CPU seconds, of the whole process and of the load alone; bytes at the peak."""

    wall_s: float
    cpu_s: float
    load_s: float
    peak: int


def make_resnet(file: Path) -> None:
    """Write a ResNet-50 (arXiv 1512.03385) for pictures of 224 × 224, with random weights: 98 MB."""
    rng = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def add(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def convolve(x: str, name: str, taken: int, made: int, size: int, stride: int = 1) -> str:
        scale = np.sqrt(2 / (taken * size * size))
        kernel = add(f"{name}.weight", rng.standard_normal((made, taken, size, size)) * scale)
        pad = [size // 2] * 4
        nodes.append(
            helper.make_node("Conv", [x, kernel], [f"{name}.conv"], strides=[stride, stride], pads=pad)
        )
        rest = [add(f"{name}.{part}", np.full(made, value)) for part, value in NORMALISATION]
        nodes.append(helper.make_node("BatchNormalization", [f"{name}.conv", *rest], [name]))
        return name

    def relu(x: str) -> str:
        nodes.append(helper.make_node("Relu", [x], [f"{x}.relu"]))
        return f"{x}.relu"

    last = relu(convolve("x", "stem", 3, 64, 7, 2))
    nodes.append(
        helper.make_node(
            "MaxPool", [last], ["pooled"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
        )
    )
    last, taken = "pooled", 64
    for stage, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            name = f"s{stage}b{block}"
            short = convolve(last, f"{name}.short", taken, inner * 4, 1, stride) if not block else last
            x = relu(convolve(last, f"{name}.a", taken, inner, 1))
            x = relu(convolve(x, f"{name}.b", inner, inner, 3, stride))
            x = convolve(x, f"{name}.c", inner, inner * 4, 1)
            nodes.append(helper.make_node("Add", [x, short], [name]))
            last, taken = relu(name), inner * 4
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    dense = [add("fc.weight", rng.standard_normal((taken, 1000)) * 0.01), add("fc.bias", np.zeros(1000))]
    nodes.append(helper.make_node("Gemm", ["flat", *dense], ["y"]))
    write(file, nodes, ["rows", 3, 224, 224], ["rows", 1000], weights)


NORMALISATION = (("scale", 1.0), ("bias", 0.0), ("mean", 0.0), ("variance", 1.0))


def make_wide(file: Path, products: int = 95) -> None:
    """Write a chain of products of 2048 × 2048, 95 of which are 1.6 GB, with weights in a file beside it."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((WIDE, WIDE)) / np.sqrt(WIDE)).astype(np.float32)
    weights, nodes, last = [], [], "x"
    for number in range(products):
        # Each is another matrix, so that no pass finds that two are equal.
        weights.append(numpy_helper.from_array(np.roll(values, number, axis=0), f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"h{number}"]))
        last = f"h{number}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    write(file, nodes, ["rows", WIDE], ["rows", WIDE], weights, external=True)


def write(
    file: Path,
    nodes: list[onnx.NodeProto],
    taken: list[str | int],
    made: list[str | int],
    weights: list[onnx.TensorProto],
    *,
    external: bool = False,
) -> None:
    """Write a model with the input `x` and the output `y`."""
    file.parent.mkdir(parents=True)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, taken)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, made)
    graph = helper.make_graph(nodes, file.parent.parent.name, [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, file, save_as_external_data=external, location="weights.bin" if external else None)


def start_plain(file: Path, threads: int) -> Start:
    """Load `file` in a process of its own, and run one row."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN, str(file), str(threads)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, line
    cpu = usage.ru_utime + usage.ru_stime
    load, peak = line.split()
    # `ru_maxrss` has what this process had when the other one was forked.
    return Start(time.perf_counter() - began, cpu, float(load), int(peak) * 1024)


def start_server(repository: Path, cache: Path, threads: int, engine: str) -> Start:
    """Serve `repository` until every model is ready."""
    flags = ["--cache-dir", str(cache), "--engine", engine, *(["--threads", str(threads)] if threads else [])]
    began = time.perf_counter()
    server = Server(repository, flags)
    try:
        server.wait_loaded()
        wall = time.perf_counter() - began
        processes = list(family(server.process.pid))
        cpu = sum(cpu_seconds(process) for process in processes)
        peak = max(peak_bytes(process) for process in processes)
        models = server.get("/models").json()["models"]
        versions = [version for model in models for version in model["versions"]]
        assert all(version["state"] == "ready" for version in versions), json.dumps(versions, indent=1)
        return Start(wall, cpu, server.metric("model_load_seconds"), peak)
    finally:
        server.kill()


def family(pid: int) -> Iterator[int]:
    """The process `pid`, and those that it started."""
    yield pid
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            yield from family(int(child))


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far, with those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process has had."""
    [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def median(starts: list[Start]) -> Start:
    """The median of each figure."""
    figures = [[getattr(start, name) for start in starts] for name in Start.__slots__]
    wall, cpu, load, peak = map(statistics.median, figures)
    return Start(wall, cpu, load, int(peak))


def row(name: str, start: Start, plain: Start | None = None) -> str:
    """One line of the table; ratios to the plain session where there is one."""
    figures = [
        (f"{start.wall_s:.2f} s", start.wall_s, plain and plain.wall_s),
        (f"{start.cpu_s:.2f} s", start.cpu_s, plain and plain.cpu_s),
        (f"{start.load_s:.2f} s", start.load_s, plain and plain.load_s),
        (f"{start.peak / 2**20:.0f} MiB", start.peak, plain and plain.peak),
    ]
    cells = [text if not other else f"{text} ({value / other:.2f} ×)" for text, value, other in figures]
    return f"| {name} | {' | '.join(cells)} |"


MODELS: dict[str, Callable[[Path], None] | None] = {
    "models": None,
    "resnet50": make_resnet,
    "wide": make_wide,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--engine", default="in-process", choices=["in-process", "process"])
    arguments = parser.parse_args()
    print("| start | wall | CPU | load | peak |\n|---|---|---|---|---|")
    for name in arguments.models.split(","):
        make = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            repository = ROOT / "models" if make is None else Path(folder, "models")
            file = repository / name / "1" / "model.onnx"
            threads = 1 if make is not None else 0
            if make is not None:
                make(file)
            cache = Path(folder, "cache")
            first = start_server(repository, cache, threads, arguments.engine)
            plain, served = [], []
            for _ in range(arguments.rounds):
                if make is not None:
                    plain.append(start_plain(file, threads))
                served.append(start_server(repository, cache, threads, arguments.engine))
            beside = median(plain) if plain else None
            if beside is not None:
                print(row(f"{name}, plain session", beside))
            processes = ", several processes" if arguments.engine == "process" else ""
            print(row(f"{name}{processes}, first start", first, beside))
            print(row(f"{name}{processes}, later starts", median(served), beside), flush=True)


if __name__ == "__main__":
    main()
