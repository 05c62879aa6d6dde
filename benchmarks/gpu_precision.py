"""Measures coarser rounding and replayed runs for a model that was trained in FP32.

    python benchmarks/gpu_precision.py [--device cuda:0] [--seconds S] [--layers N] [--out FOLDER]

One instance runs in this process from and to the host's memory; the figures are rows a second by batch
size. ONNX Runtime runs the networks of `gpu_models.py` in FP32, TF32 and FP16. PyTorch runs an encoder of N
layers, exported as a program, in FP32 and FP16, with and without a CUDA graph. The report also has the
difference of the outputs from those in FP32. On the CPU (`--device cpu`, to try the script) there are
neither TF32 nor graphs. FOLDER gets the results as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from inferpool.backends.base import DeviceModel, GpuOptions, LoadedModel, LoadOptions
from inferpool.backends.registry import find_backend
from inferpool.repository.load.gpu.precision import Reference
from inferpool.tensors import Tensors

from benchmarks.gpu import machine, save
from benchmarks.gpu_models import MODELS, TOKENS, WIDTH, rows

SIZES: Final = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--layers", type=int, default=12, help="number of layers of the PyTorch encoder")
    parser.add_argument("--models", default=",".join([*MODELS, "torch"]))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(options.device), "layers": options.layers, "models": {}}
    names = options.models.split(",")
    date = report["machine"]["date"][:10]
    stem = f"gpu-precision-{'-'.join(names)}-{date}-{options.device.replace(':', '')}"
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            found: dict[str, Any] = {}
            report["models"][name] = found
            for way, model, make in ways(name, Path(temporary), options):
                print(f"{name}: {way}", flush=True)
                rates = measured(model, make, way, options.seconds)
                if not found:
                    exact = Reference([make(16)], [model.run(make(16))])
                gap = exact.difference(model, way)
                found[way] = {"by_size": rates, "absolute": gap.absolute, "relative": gap.relative}
                print(json.dumps(found[way]), flush=True)
                save(report, table(report), options.out, stem)
                model.close()
    print(table(report))


Make = Callable[[int], Tensors]


def ways(name: str, folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, LoadedModel, Make]]:
    """Each way to run a model: its name, the loaded model, and a function that makes rows. FP32 is first."""
    gpu = options.device != "cpu"
    if name == "torch":
        file = exported(folder / "encoder.pt2", options.layers)
        for fp16 in (False, True):
            for graphs in (False, True) if gpu else (False,):
                model = find_backend("torch").load(
                    file,
                    LoadOptions(
                        device=options.device, trusted=True, gpu=GpuOptions(fp16=fp16, graphs=graphs)
                    ),
                )
                way = ("FP16" if fp16 else "FP32") + (", graph" if graphs else "")
                [spec] = model.signature.inputs
                yield way, model, lambda count, key=spec.name: {key: vectors(count)}
        return
    file = folder / name / "1" / "model.onnx"
    MODELS[name](file, True)
    for way in ("FP32", "TF32", "FP16") if gpu else ("FP32", "FP16"):
        model = find_backend("onnx").load(
            file,
            LoadOptions(
                device=options.device,
                gpu=GpuOptions(tf32=way == "TF32", fp16=way == "FP16", cache_dir=folder / f"{name}-cache"),
            ),
        )
        yield way, model, lambda count: {"x": rows(name, count, True)}


def exported(file: Path, layers: int) -> Path:
    """Export an encoder of BERT-base's width with random weights, which takes vectors of tokens."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, activation="gelu", batch_first=True)
    network = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    dim = torch.export.Dim("rows")
    with torch.no_grad():
        program = torch.export.export(network, (torch.rand(2, TOKENS, WIDTH),), dynamic_shapes=({0: dim},))
    torch.export.save(program, str(file))
    return file


def vectors(count: int) -> Any:
    return np.random.default_rng(1).standard_normal((count, TOKENS, WIDTH), np.float32)


def measured(model: LoadedModel, make: Make, way: str, seconds: float) -> dict[int, float]:
    """Rows a second by batch size."""
    found = {}
    for size in SIZES:
        batch = make(size)
        run: Callable[[], object] = partial(model.run, batch)
        if isinstance(model, DeviceModel):
            if way.endswith("graph"):
                model.capture([batch], size)
            run = partial(model.run_padded, [batch], size)
        for _ in range(3):
            run()
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            run()
            count += 1
        found[size] = size * count / (time.perf_counter() - began)
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    of = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    lines = [
        f"# {', '.join(of['gpus']) or 'no GPU'}, {of['date']}",
        "",
        f"`python benchmarks/gpu_precision.py --device {of['device']} --layers {report['layers']}` at"
        f" {of['commit']}; {of['cores']} cores; Python {of['python']}; {versions}. Rows a second.",
        "",
        "| model | way | " + " | ".join(f"{size} rows" for size in SIZES) + " | off FP32 | of the scale |",
        "|---|---|" + "---|" * (len(SIZES) + 2),
    ]
    lines += [
        f"| {name} | {way} | "
        + " | ".join(f"{rate:.0f}" for rate in figures["by_size"].values())
        + f" | {figures['absolute']:.2g} | {figures['relative']:.1g} |"
        for name, found in report["models"].items()
        for way, figures in found.items()
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
