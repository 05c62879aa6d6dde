"""Measures the normalisation of pictures on the GPU, for a model that takes FP32.

    python benchmarks/gpu_pictures.py [--device cuda:0] [--seconds S] [--side PIXELS] [--out FOLDER]

The model is ResNet-50 in FP16 behind an FP32 input of 3 × 224 × 224; the picture is a JPEG of PIXELS ×
PIXELS. The first part runs one instance in this process, in rows a second by batch size: with normalised
numbers from the host's memory, and with pixels that the card normalises. The second part runs a real server
with client processes: pictures a second, and the web process's time for a picture, if the card normalises
and if the CPU does. On the CPU (`--device cpu`) only the second part runs. FOLDER gets the results as JSON
and Markdown.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import onnx
from onnx import TensorProto
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from inferpool.backends.base import DeviceModel, GpuOptions, LoadOptions
from inferpool.backends.registry import find_backend
from inferpool.cli import main as serve
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.image_config import ImageConfig
from inferpool.pixel_table import Normalisation

from benchmarks.gpu import machine, save
from benchmarks.gpu_load import load
from benchmarks.gpu_models import resnet50
from tests.server import ROOT, Server

SIZES: Final = (1, 16, 64)
CONFIG: Final = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "resize": 224}
WAYS: Final = {"on the card": "inferpool", "on the CPU": "benchmarks.gpu_pictures"}
"""The device that normalises, and the module that starts such a server."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--side", type=int, default=256, help="height and width of the picture, in pixels")
    half = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--processes", type=int, default=half, help="number of client processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(options.device), "side": options.side}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        file = folder / "1" / "model.onnx"
        taking_floats(file)
        if options.device != "cpu":
            report["one instance"] = in_process(file, options)
        ways = WAYS if options.device != "cpu" else {"on the CPU": WAYS["on the CPU"]}
        stem = f"gpu-pictures-{report['machine']['date'][:10]}-{options.device.replace(':', '')}"
        report["served"] = {}
        for way, module in ways.items():
            report["served"][way] = served(folder, module, options)
            save(report, table(report), options.out, stem)
    print(table(report))


def taking_floats(file: Path) -> None:
    """Write the ResNet-50 of `gpu_models.py` with an FP32 input."""
    resnet50(file)
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, file)
    lines = [f"{key} = {json.dumps(value)}" for key, value in CONFIG.items()]
    (file.parents[1] / "model.toml").write_text("\n".join(["[image]", *lines, ""]))


def in_process(file: Path, options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Rows a second by batch size, for numbers and for pixels, replayed from CUDA graphs."""
    plain = find_backend("onnx").load(file, LoadOptions(device="cpu"))
    settings: Any = CONFIG
    normalise = ImageCodec(ImageConfig(**settings), plain.signature).normalisation
    plain.close()
    assert normalise is not None
    model = find_backend("onnx").load(
        file, LoadOptions(device=options.device, gpu=GpuOptions(graphs=True, normalisation=normalise))
    )
    assert isinstance(model, DeviceModel)
    assert model.takes_pixels.ok, model.takes_pixels.reason
    rates: dict[str, dict[int, float]] = {"numbers": {}, "pixels": {}}
    for size in sorted(SIZES, reverse=True):
        print(f"one instance, {size} rows", flush=True)
        batches = pictures(normalise, size)
        model.capture([{"x": batches["numbers"]}], size)
        for kind, batch in batches.items():
            rates[kind][size] = size * rate(model, batch, size, options.seconds)
    model.close()
    return rates


def pictures(normalise: Normalisation, count: int) -> dict[str, Any]:
    shape = (count, normalise.height, normalise.width, normalise.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return {"numbers": normalise.normalise(pixels), "pixels": pixels}


def rate(model: DeviceModel, batch: Any, size: int, seconds: float) -> float:
    """Measure runs a second."""
    for _ in range(3):
        model.run_padded([{"x": batch}], size)
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        model.run_padded([{"x": batch}], size)
        count += 1
    return count / (time.perf_counter() - began)


def served(folder: Path, module: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a server whose clients send the next picture at each answer."""
    print(f"served by {module}", flush=True)
    environ = {
        "INFERPOOL_CACHE_DIR": str(folder.parent / "cache"),
        "INFERPOOL_MEASURE_MS": str(round(2000 * options.seconds)),
        "PYTHONPATH": str(ROOT),
    }
    server = Server(folder, ["--devices", options.device, "--queue-ms", "60000"], environ, module)
    try:
        server.wait_for(r"\d+ models$", 300)
        version = server.get("/models/pictures/1").json()
        if version["state"] != "ready":
            raise RuntimeError(version["reason"])
        before = server.metric("web_busy_seconds_total")
        answered = load(server.port, request(options.side), options.processes, 16, options.seconds)
        # The busy time covers the whole load; the other figures cover its last four fifths.
        busy_s = server.metric("web_busy_seconds_total") - before
        return {
            "gpu": version["gpu"],
            "pictures_s": answered.requests_s,
            "median_ms": answered.median_ms,
            "web_us": 1e6 * busy_s / (answered.requests_s * options.seconds * 1.25),
        }
    finally:
        server.kill()


def request(side: int) -> bytes:
    """An HTTP request with a picture of smooth gradients, which is neither noise nor one colour."""
    slopes = np.linspace(0, 255, side)
    channels = (slopes[:, None] + 0 * slopes, slopes + 0 * slopes[:, None], (slopes[:, None] + slopes) / 2)
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(file, "JPEG", quality=90)
    body = file.getvalue()
    return (
        "POST /predict/pictures HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        f"Accept: application/x-npy\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    of = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    lines = [
        f"# {', '.join(of['gpus']) or 'no GPU'}, {of['date']}",
        "",
        f"`python benchmarks/gpu_pictures.py --device {of['device']} --side {report['side']}` at"
        f" {of['commit']}; {of['cores']} cores; Python {of['python']}; {versions}.",
        "",
    ]
    if "one instance" in report:
        lines += [
            "| one instance, rows a second | " + " | ".join(f"{size} rows" for size in SIZES) + " |",
            "|---|" + "---|" * len(SIZES),
        ]
        for kind, rates in report["one instance"].items():
            lines.append(f"| {kind} | " + " | ".join(f"{rates[size]:.0f}" for size in SIZES) + " |")
        lines.append("")
    lines += ["| normalised | pictures a second | median ms | web µs a picture |", "|---|---|---|---|"]
    for way, found in report["served"].items():
        figures = f"{found['pictures_s']:.0f} | {found['median_ms']:.1f} | {found['web_us']:.0f}"
        lines.append(f"| {way} | {figures} |")
    return "\n".join([*lines, ""])


def serve_numbers() -> None:
    """Serve with a check of pixels that always fails, so that the CPU normalises."""
    with patch(
        "inferpool.repository.load.gpu.gpu_copies.check_pixels",
        lambda *_, **__: "switched off for this benchmark",
    ):
        serve()


if __name__ == "__main__":
    sys.exit(serve_numbers() if sys.argv[1:2] == ["serve"] else main())
