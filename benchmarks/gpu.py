"""Compares a server on a GPU with the same session in a loop in one process.

    python benchmarks/gpu.py [--device cuda:0] [--seconds S] [--models resnet50,encoder,small]
                             [--sessions plain,graphs,TensorRT] [--webs N] [--out FOLDER]

For each model, one run measures three things. First, the rate of the session with the rows already on the
card. Second, the rate from and to the host's memory, with one instance and with two. Third, the rate of a
real server for `/v2` requests with binary tensors, of 16 rows and of one row, from client processes.

Each is measured with plain CUDA runs, with runs that are replayed from CUDA graphs (the server's default),
and with TensorRT if it is installed. All rates are rows a second. FOLDER gets the results as JSON and
Markdown with the date, the device and the versions. The table is printed last.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from inferpool.backends.base import GpuOptions, LoadOptions, TensorRTPlan
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.backends.onnx.gpu.bound_model import BoundModel
from inferpool.backends.onnx.gpu.tensorrt import tensorrt_unavailable_reason
from inferpool.system.gpus import cuda_driver

from benchmarks.gpu_load import load, request
from benchmarks.gpu_models import MODELS, rows
from tests.fake_gpu.host_memory import HostMemory
from tests.server import Server

SHARE: Final = 0.9
"""The share of the session's best rate that requests of 16 rows have to reach."""
SMALL_MS: Final = 0.6
"""The median time in which the small network has to answer single requests."""
SIZES: Final = (1, 4, 16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--sessions",
        default="plain,graphs,TensorRT",
        help="the ways to run a model; unavailable ones are left out",
    )
    half = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--processes", type=int, default=half, help="number of client processes")
    parser.add_argument(
        "--webs",
        type=int,
        default=0,
        help="number of web processes beside an engine; 0: one process",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(options.device), "models": {}, "faults": []}
    names = options.models.split(",")
    webs = f"-webs{options.webs}" if options.webs else ""
    device = options.device.replace(":", "")
    stem = f"gpu-{'-'.join(names)}{webs}-{report['machine']['date'][:10]}-{device}"
    with tempfile.TemporaryDirectory() as temporary:
        for session in sessions(options):
            for name in names:
                file = Path(temporary) / name / "1" / "model.onnx"
                if not file.exists():
                    MODELS[name](file)
                try:
                    print(f"{name}, {session}: in one process", flush=True)
                    own = own_rates(name, file, options.device, session, options.seconds)
                    print(json.dumps(own), flush=True)
                    print(f"{name}, {session}: served", flush=True)
                    figures = {"own": own} | served(name, file, temporary, session, options)
                    print(json.dumps(figures), flush=True)
                except Exception:  # noqa: BLE001 - one model that fails must not cost the others their figures
                    report["faults"].append(f"{name}, {session}: {traceback.format_exc()}")
                    print(report["faults"][-1], flush=True)
                    continue
                report["models"].setdefault(name, {})[session] = figures
                save(report, table(report), options.out, stem)
    print(table(report))
    if report["faults"]:
        sys.exit(1)


def save(report: dict[str, Any], text: str, out: Path, stem: str) -> None:
    """Write the report so far as JSON and its table as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text)


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions of a measurement."""
    driver = cuda_driver()
    names = (
        "onnxruntime-gpu",
        "onnxruntime",
        "torch",
        "numpy",
        "nvidia-cudnn-cu13",
        "nvidia-cublas",
        "tensorrt-cu13-libs",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy of the tree without its history
        commit = os.environ.get("COMMIT", "an unknown commit")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpus": [gpu.name for gpu in driver.gpus()],
        "driver_cuda": driver.unavailable_reason() or "{}.{}".format(*driver.cuda()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def sessions(options: argparse.Namespace) -> list[str]:
    """The requested ways to run a model that are available here."""
    reasons: dict[str, str | None] = {"plain": None, "graphs": "no GPU", "TensorRT": "no GPU"}
    if options.device != "cpu":
        reasons = {"plain": None, "graphs": None, "TensorRT": tensorrt_unavailable_reason()}
    wanted = options.sessions.split(",")
    for session in wanted:
        if reasons[session]:
            print(f"without {session}: {reasons[session]}", flush=True)
    return [session for session in wanted if not reasons[session]]


def own_rates(name: str, file: Path, device: str, session: str, seconds: float) -> dict[str, Any]:
    """The session's rates in this process by batch size, up to the size at which the rate stops growing."""
    models = [bound(name, file, device, session) for _ in range(2)]
    by_size: dict[str, Any] = {}
    best: list[float] = []
    for size in SIZES:
        try:
            batch = {"x": rows(name, size)}
            by_size[str(size)] = found = rates_of(models, batch, size, session == "graphs", seconds / 4)
        except Exception as error:  # noqa: BLE001 - any error here means too little memory
            by_size[str(size)] = {"fault": str(error)[:200]}
            break
        best.append(max(found.values()))
        if len(best) > 3 and best[-1] < 1.02 * max(best[:-1]):
            break
    for model in models:
        model.close()
    measured = [found for found in by_size.values() if "fault" not in found]
    return {"by_size": by_size} | {kind: max(found[kind] for found in measured) for kind in measured[0]}


def rates_of(
    models: list[BoundModel], batch: dict[str, Any], size: int, graphs: bool, seconds: float
) -> dict[str, float]:
    """Rows a second on the card alone, and from and to the host's memory with one and two instances."""
    key = (size, *((name, tensor.shape) for name, tensor in batch.items()))

    def prepare(model: BoundModel) -> None:
        # Graphs belong to the thread that captures them.
        model.begin()
        model.run_padded([batch], size)
        if graphs:
            model.capture([batch], size)

    def on_card(model: BoundModel) -> None:
        # The inputs and outputs are on the device already, so this is the limit of the card.
        known = model._bindings[key]
        model._session.run_with_iobinding(known.binding, known.options)
        model._memory.wait()

    def rate(run: Callable[[BoundModel], object], count: int) -> float:
        return size * together(models[:count], prepare, run, seconds)

    run: Callable[[BoundModel], object] = lambda model: model.run_padded([batch], size)  # noqa: E731
    return {"on_card": rate(on_card, 1), "one": rate(run, 1), "two": rate(run, 2)}


def bound(name: str, file: Path, device: str, session: str) -> BoundModel:
    """The model as an instance has it; also on the CPU, so that the script can be tried without a GPU."""
    options = LoadOptions(device=device, gpu=GpuOptions(graphs=session == "graphs"))
    if session == "TensorRT":
        folder = file.parents[2] / "engines" / name
        folder.mkdir(parents=True, exist_ok=True)
        shape = (SIZES[-1], *rows(name, 1).shape[1:])
        options = options.with_gpu(tensorrt=TensorRTPlan(folder, (("x", shape),)))
    model = OnnxBackend().load(file, options)
    if isinstance(model, BoundModel):
        return model
    session_of: Any = model
    return BoundModel(session_of._session, model.signature, device, HostMemory(), {})


def together(
    models: list[BoundModel],
    prepare: Callable[[BoundModel], None],
    run: Callable[[BoundModel], object],
    seconds: float,
) -> float:
    """Runs a second, with a thread for each of `models` that repeats `run` once all are prepared."""
    counts = [0] * len(models)
    faults: list[Exception] = []
    began: list[float] = []
    barrier = threading.Barrier(len(models), lambda: began.append(time.perf_counter()))

    def work(number: int) -> None:
        try:
            prepare(models[number])
            barrier.wait()
            while not counts[number] or time.perf_counter() < began[0] + seconds:
                run(models[number])
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 - raised again below, on the calling thread
            faults.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return sum(counts) / (time.perf_counter() - began[0])


def served(name: str, file: Path, folder: str, session: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a server: 16 rows a request, one row a request, and one request at a time."""
    environ = {
        "INFERPOOL_CACHE_DIR": f"{folder}/cache",
        "INFERPOOL_MEASURE_MS": str(round(2000 * options.seconds)),
    }
    settings = {"plain": "graphs = false", "graphs": "", "TensorRT": "graphs = false\ntensorrt = true"}
    (file.parents[1] / "model.toml").write_text(f"[gpu]\n{settings[session]}\n")
    flags = ["--devices", options.device, "--queue-ms", "60000"]
    if options.webs:
        flags += ["--engine", "process", "--web-processes", str(options.webs)]
    server = Server(file.parents[1], flags, environ)
    try:
        server.wait_for(r"\d+ models$", 300)
        if session == "TensorRT":
            server.wait_for(r"TensorRT takes over|no TensorRT", 1200)
        version = server.get(f"/models/{name}/1").json()
        if version["state"] != "ready":
            raise RuntimeError(version["reason"])
        return {
            "version": {key: version[key] for key in ("batching", "instances", "gpu", "latency", "load_ms")},
            "16 rows": measured(server, name, 16, options, options.processes, 8),
            "1 row": measured(server, name, 1, options, options.processes, 16),
            "alone": measured(server, name, 1, options, 1, 1),
        }
    finally:
        server.kill()


def measured(
    server: Server, name: str, count: int, options: argparse.Namespace, processes: int, connections: int
) -> dict[str, float]:
    """Rates, durations, and how busy the web process and the instances were."""
    counters = ("web_busy_seconds_total", "instance_busy_seconds_total", "gpu_energy_joules_total")
    before, began = {key: server.metric(key) for key in counters}, time.perf_counter()
    answered = load(server.port, request(name, rows(name, count)), processes, connections, options.seconds)
    elapsed = time.perf_counter() - began
    spent = {key: server.metric(key) - before[key] for key in counters}
    # The busy time covers the whole load; the other figures cover its last four fifths.
    busy_s = options.seconds * 1.25
    instances = server.metric("instances", state="ready")
    return {
        "rows_s": count * answered.requests_s,
        "median_ms": answered.median_ms,
        "p99_ms": answered.p99_ms,
        "web_share": spent["web_busy_seconds_total"] / busy_s,
        "web_us_request": 1e6 * spent["web_busy_seconds_total"] / (answered.requests_s * busy_s),
        "instances_share": spent["instance_busy_seconds_total"] / instances / busy_s,
        "watts": spent["gpu_energy_joules_total"] / elapsed,
        "utilization": server.metric("gpu_utilization_ratio"),
        "memory_bytes": server.metric("gpu_memory_used_bytes"),
    }


def limit(figures: dict[str, float]) -> str:
    """The part of the system that limited the rate."""
    if figures["web_share"] > SHARE:
        return "web process"
    return "instances" if figures["instances_share"] > SHARE else "clients or network"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    of = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    lines = [
        f"# {', '.join(of['gpus']) or 'no GPU'}, {of['date']}",
        "",
        f"`python benchmarks/gpu.py --device {of['device']}` at {of['commit']}; CUDA of the driver:"
        f" {of['driver_cuda']}; {of['cores']} cores; Python {of['python']}; {versions}. Rows a second.",
        "",
        "| model | session | on the card | one instance | two | served, 16 rows | share | served, 1 row"
        " | limit at 16 | limit at 1 | web µs a request | alone, median ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    ways_of_all = [
        (name, session, figures)
        for name, ways in report["models"].items()
        for session, figures in ways.items()
    ]
    for name, session, figures in ways_of_all:
        own, many, single, alone = (figures[key] for key in ("own", "16 rows", "1 row", "alone"))
        best = max(own["on_card"], own["one"], own["two"])
        share = many["rows_s"] / best
        lines.append(
            f"| {name} | {session} | {own['on_card']:.0f} | {own['one']:.0f} | {own['two']:.0f}"
            f" | {many['rows_s']:.0f} | {share:.0%} | {single['rows_s']:.0f} | {limit(many)}"
            f" | {limit(single)} | {many['web_us_request']:.0f} | {alone['median_ms']:.3f} |"
        )
        if name == "small":
            reached = alone["median_ms"] < SMALL_MS
            verdicts.append(
                f"- {name}, {session}, alone: {alone['median_ms']:.3f} ms of {SMALL_MS}: {_word(reached)}"
            )
        else:
            verdicts.append(
                f"- {name}, {session}, 16 rows: {share:.0%} of {SHARE:.0%}: {_word(share >= SHARE)}"
            )
    return "\n".join([*lines, "", *verdicts, ""])


def _word(reached: bool) -> str:
    return "reached" if reached else "missed"


if __name__ == "__main__":
    main()
