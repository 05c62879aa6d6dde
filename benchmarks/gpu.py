"""What a GPU does for requests, beside what the same session does for a loop in one process.

    python benchmarks/gpu.py [--device cuda:0] [--seconds S] [--models resnet50,encoder,small] [--out FOLDER]

For each model, in one run: the rate of its session with the rows on the card already; the rate from and to
the host's memory, by one instance and by two; then a real server's, for requests of 16 rows and of one, by
`/v2` with binary tensors from processes of their own. All rates are rows a second. Results go to FOLDER as
JSON and Markdown, with the date, the device and the versions; the table is printed last.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_load import load, request
from benchmarks.gpu_models import MODELS, rows
from service.backends.base import LoadOptions
from service.backends.cuda_runtime import HostMemory
from service.backends.onnx import OnnxBackend
from service.backends.onnx_bound import BoundModel
from service.devices import cuda_driver
from tests.server import Server

SHARE: Final = 0.9
"""Of the session's own best rate that requests of 16 rows are to reach."""
SMALL_MS: Final = 0.6
"""What the small network is to answer in, at the median, one request at a time."""
SIZES: Final = (1, 4, 16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--models", default=",".join(MODELS))
    half = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--processes", type=int, default=half, help="of clients")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(options.device), "models": {}}
    with tempfile.TemporaryDirectory() as place:
        for name in options.models.split(","):
            file = Path(place) / name / "1" / "model.onnx"
            MODELS[name](file)
            print(f"{name}: in one process", flush=True)
            own = own_rates(name, file, options.device, options.seconds)
            print(f"{name}: served", flush=True)
            report["models"][name] = {"own": own} | served(name, file, place, options)
            file.unlink()
    text = table(report)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{report['machine']['date'][:10]}-{options.device.replace(':', '')}"
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(text)
    print(text)


def machine(device: str) -> dict[str, Any]:
    """What was measured on, and with what."""
    driver = cuda_driver()
    names = ("onnxruntime-gpu", "onnxruntime", "torch", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpus": [gpu.name for gpu in driver.gpus()],
        "driver_cuda": "{}.{}".format(*driver.cuda()) if not driver.fault() else driver.fault(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def own_rates(name: str, file: Path, device: str, seconds: float) -> dict[str, Any]:
    """The session's rates in this process, by batch size, until a doubling brings nothing any more."""
    models = [bound(file, device) for _ in range(2)]
    by_size: dict[str, Any] = {}
    best: list[float] = []
    for size in SIZES:
        try:
            by_size[str(size)] = found = rates_of(models, {"x": rows(name, size)}, size, seconds / 4)
        except Exception as error:  # noqa: BLE001 - the card has no memory for it, in whatever words
            by_size[str(size)] = {"fault": str(error)[:200]}
            break
        best.append(max(found.values()))
        if len(best) > 3 and best[-1] < 1.02 * max(best[:-1]):
            break
    for model in models:
        model.close()
    measured = [found for found in by_size.values() if "fault" not in found]
    return {"by_size": by_size} | {kind: max(found[kind] for found in measured) for kind in measured[0]}


def rates_of(models: list[BoundModel], batch: dict[str, Any], size: int, seconds: float) -> dict[str, float]:
    """Rows a second on the card alone, and from and to the host's memory by one and by two instances."""
    for model in models:
        model.run_padded([batch], size)
    first = models[0]
    # Its inputs and outputs are on the device from here on; this is the card's own limit.
    binding = first._bindings[(size, *((name, tensor.shape) for name, tensor in batch.items()))].binding
    runs: list[Callable[[], object]] = [partial(model.run_padded, [batch], size) for model in models]
    return {
        "on_card": size * rate([partial(first._session.run_with_iobinding, binding)], seconds),
        "one": size * rate(runs[:1], seconds),
        "two": size * rate(runs, seconds),
    }


def bound(file: Path, device: str) -> BoundModel:
    """The model as an instance has it; on the CPU too, so that this script can be tried without a GPU."""
    model = OnnxBackend().load(file, LoadOptions(device=device))
    if isinstance(model, BoundModel):
        return model
    return BoundModel(model._session, model.signature, device, HostMemory(), {})


def rate(runs: list[Callable[[], object]], seconds: float) -> float:
    """Runs a second of threads, one for each of `runs`, which repeat it."""
    counts = [0] * len(runs)
    ends = time.perf_counter() + seconds

    def work(number: int) -> None:
        while not counts[number] or time.perf_counter() < ends:
            runs[number]()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def served(name: str, file: Path, place: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a server answers: 16 rows a request, one row, and one request at a time."""
    environ = {"INFERPOOL_CACHE_DIR": f"{place}/cache", "INFERPOOL_MEASURE_MS": "10000"}
    server = Server(file.parents[1], ["--devices", options.device, "--queue-ms", "60000"], environ)
    try:
        server.wait_for(r"\d+ models$", 300)
        version = server.get(f"/models/{name}/1").json()
        if version["state"] != "ready":
            raise RuntimeError(version["reason"])
        return {
            "version": {key: version[key] for key in ("batching", "instances", "gpu", "latency", "load_ms")},
            "16 rows": measured(server, name, 16, options, options.processes, 4),
            "1 row": measured(server, name, 1, options, options.processes, 16),
            "alone": measured(server, name, 1, options, 1, 1),
        }
    finally:
        server.kill()


def measured(
    server: Server, name: str, count: int, options: argparse.Namespace, processes: int, connections: int
) -> dict[str, float]:
    """Rates, durations, and who was busy meanwhile."""
    counters = ("web_busy_seconds_total", "instance_busy_seconds_total", "gpu_energy_joules_total")
    before, began = {key: server.metric(key) for key in counters}, time.perf_counter()
    answered = load(server.port, request(name, rows(name, count)), processes, connections, options.seconds)
    elapsed = time.perf_counter() - began
    spent = {key: server.metric(key) - before[key] for key in counters}
    # Over all of the load, of which the figures are the later four fifths: clients start and end besides.
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
    """Who had no time left."""
    if figures["web_share"] > SHARE:
        return "web process"
    return "instances" if figures["instances_share"] > SHARE else "clients, or the way there"


def table(report: dict[str, Any]) -> str:
    """The figures for people."""
    of = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    lines = [
        f"# {', '.join(of['gpus']) or 'no GPU'}, {of['date']}",
        "",
        f"`python benchmarks/gpu.py --device {of['device']}` at {of['commit']}; CUDA of the driver:"
        f" {of['driver_cuda']}; {of['cores']} cores; Python {of['python']}; {versions}. Rows a second.",
        "",
        "| model | on the card | one instance | two | served, 16 rows | share | served, 1 row | limit at 16"
        " | limit at 1 | web µs a request | alone, median ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for name, figures in report["models"].items():
        own, many, single, alone = (figures[key] for key in ("own", "16 rows", "1 row", "alone"))
        best = max(own["on_card"], own["one"], own["two"])
        share = many["rows_s"] / best
        lines.append(
            f"| {name} | {own['on_card']:.0f} | {own['one']:.0f} | {own['two']:.0f} | {many['rows_s']:.0f}"
            f" | {share:.0%} | {single['rows_s']:.0f} | {limit(many)} | {limit(single)}"
            f" | {many['web_us_request']:.0f} | {alone['median_ms']:.3f} |"
        )
        if name == "small":
            reached = alone["median_ms"] < SMALL_MS
            verdicts.append(f"- {name} alone: {alone['median_ms']:.3f} ms of {SMALL_MS}: {_word(reached)}")
        else:
            verdicts.append(f"- {name}, 16 rows: {share:.0%} of {SHARE:.0%}: {_word(share >= SHARE)}")
    return "\n".join([*lines, "", *verdicts, ""])


def _word(reached: bool) -> str:
    return "reached" if reached else "missed"


if __name__ == "__main__":
    main()
