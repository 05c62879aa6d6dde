"""Measures what repeating batch sizes gain: runs of odd sizes as they are, and padded to a size with a graph.

    python benchmarks/gpu_buckets.py [--device cuda:0] [--models resnet50,encoder] [--runs N] [--out FOLDER]

For each size: the first run of that size, the median of later runs, and the median of runs that are padded
to the next size that was captured as a CUDA graph. All are milliseconds, from and to the host's memory. The
results are written as JSON and printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu import bound, machine
from benchmarks.gpu_models import MODELS, rows

SIZES: Final = {3: 4, 5: 8, 11: 16, 23: 32, 45: 64}
"""Odd numbers of rows, and the sizes that they are padded to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--models", default="resnet50,encoder")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(options.device)}
    print("| model | rows | first run | later runs | padded to | replayed |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models.split(","):
            file = Path(temporary) / name / "1" / "model.onnx"
            MODELS[name](file)
            report[name] = measured(name, file, options.device, options.runs)
    file = options.out / f"gpu-buckets-{options.device.replace(':', '')}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")


def measured(name: str, file: Path, device: str, runs: int) -> dict[int, dict[str, float]]:
    """The times of one model by number of rows, in milliseconds."""
    plain, graphs = (bound(name, file, device, session) for session in ("plain", "graphs"))
    found = {}
    for model in (plain, graphs):
        model.begin()
    plain.run_padded([{"x": rows(name, 1)}], 1)  # what only the first run of a session costs
    for count, size in SIZES.items():
        batch = [{"x": rows(name, count)}]
        graphs.run_padded(batch, size)
        if device != "cpu":
            graphs.capture(batch, size)
        times = [timed_ms(plain, batch, count) for _ in range(runs + 1)]
        replayed = [timed_ms(graphs, batch, size) for _ in range(runs)]
        found[count] = {
            "first": times[0],
            "later": statistics.median(times[1:]),
            "replayed": statistics.median(replayed),
        }
        first, later, padded = found[count].values()
        print(f"| {name} | {count} | {first:.2f} | {later:.2f} | {size} | {padded:.2f} |", flush=True)
    plain.close()
    graphs.close()
    return found


def timed_ms(model: Any, batch: Any, size: int) -> float:
    """The time of one run, in milliseconds."""
    began = time.perf_counter()
    model.run_padded(batch, size)
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
