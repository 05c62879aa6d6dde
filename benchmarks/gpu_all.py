"""Tests and measures everything on a machine with a GPU and no network, the most important first.

    python3 benchmarks/gpu_all.py [--wheels FOLDER] [--device cuda:0] [--minutes M] [--steps A,B,…]
                                  [--out RESULTS] [--python ENVIRONMENT]

The machine has NVIDIA's driver, CUDA 13 and PyTorch. FOLDER has the wheels of everything else, also in tar
files. They are unpacked into a new environment, beside the packages that are installed already. Each step has
a limit of time, so that the whole takes at most M minutes. A step writes its output to RESULTS/STEP.log, and
its figures to RESULTS as soon as it has them. A table of all steps is printed last. With
`--device cpu` every step runs in its smallest form on the CPU, so that the script can be tried anywhere.

This script itself needs Python's standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
SHOWN_LINES: Final = 60
"""The last lines of a step's output that are printed; its log file has all of them."""


@dataclass(frozen=True)
class Step:
    """One command: a name, the arguments of Python, and the most seconds that it may take.

    `figures` is the pattern of the Markdown files that it writes.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    figures: str = ""


def steps(device: str, out: Path) -> list[Step]:
    """All steps, the most important first."""
    at = ("--device", device, "--out", str(out))
    if device == "cpu":
        tiny = ("--seconds", "0.1", *at)
        return [
            Step("facts", ("-c", FACTS), 60),
            Step("tests", (*PYTEST, "tests/backends/onnx/gpu", "tests/repository/load/gpu"), 300),
            Step("tests-alone", (*PYTEST, "tests/backends/torch/gpu"), 300),
            Step(
                "precision-torch",
                ("benchmarks/gpu_precision.py", "--models", "torch", "--layers", "1", *tiny),
                120,
                "gpu-precision-torch-*.md",
            ),
            Step(
                "served",
                ("benchmarks/gpu.py", "--models", "small", "--sessions", "plain", "--processes", "1", *tiny),
                120,
                "gpu-small-*.md",
            ),
            Step(
                "precision",
                ("benchmarks/gpu_precision.py", "--models", "small", *tiny),
                120,
                "gpu-precision-small-*.md",
            ),
        ]
    return [
        Step("facts", ("-c", FACTS), 60),
        Step("tests", (*PYTEST, "-n", "6", "tests/gpu", "-k", "not close_frees"), 110),
        Step("tests-alone", (*PYTEST, "tests/gpu", "-k", "close_frees"), 60),
        Step(
            "served",
            ("benchmarks/gpu.py", "--seconds", "2", "--sessions", "graphs,plain", *at),
            200,
            "gpu-resnet50-*.md",
        ),
        Step("engines", ("benchmarks/gpu_engines.py", "--seconds", "3", "--webs", "2,4", *at), 300),
        Step("slots", ("benchmarks/gpu_slots.py", "--out", str(out)), 40),
        Step("buckets", ("benchmarks/gpu_buckets.py", *at), 60),
        Step(
            "served-webs",
            (
                *("benchmarks/gpu.py", "--models", "resnet50,encoder", "--webs", "4", "--seconds", "2"),
                *("--sessions", "graphs", *at),
            ),
            150,
            "gpu-resnet50-encoder-webs4-*.md",
        ),
        Step(
            "precision-torch",
            ("benchmarks/gpu_precision.py", "--models", "torch", "--seconds", "0.5", *at),
            90,
            "gpu-precision-torch-*.md",
        ),
        Step(
            "pictures", ("benchmarks/gpu_pictures.py", "--seconds", "2", *at), 90, "gpu-pictures-*.md"
        ),
        Step(
            "precision",
            ("benchmarks/gpu_precision.py", "--models", "resnet50,encoder", "--seconds", "0.5", *at),
            120,
            "gpu-precision-resnet50-*.md",
        ),
    ]  # fmt: skip


PYTEST: Final = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-o", "pythonpath=.", "--tb=short"),
    *("--timeout", "60"),
)
"""The package is the installed one, and other versions of packages may warn of other things."""

FACTS: Final = """
import importlib.metadata as metadata, os, platform, shutil, subprocess, sys
print(sys.version, platform.platform(), os.cpu_count(), "cores")
for name in ("torch", "onnxruntime-gpu", "onnxruntime", "onnx", "numpy", "fastapi", "inferpool"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi"])
import torch
print("torch's CUDA:", torch.version.cuda, torch.cuda.is_available())
import onnxruntime
print(onnxruntime.__file__, onnxruntime.__version__, onnxruntime.get_available_providers())
import inferpool
print(inferpool.__file__)
from inferpool.system.gpus import cuda_driver
driver = cuda_driver()
print(driver.unavailable_reason(), driver.cuda(), driver.gpus())
"""


def main() -> int:
    """Run the steps; the status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder with wheels and tar files of wheels")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--steps", default="", help="the steps to run, separated by commas; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--python", type=Path, help="where to make the environment for the wheels")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    if options.wheels:
        folder = options.python or Path(tempfile.mkdtemp(prefix="gpu-all-"))
        began = time.monotonic()
        python = environment(folder.absolute(), options.wheels)
        print(f"unpacked the wheels in {time.monotonic() - began:.0f} s", flush=True)
    wanted = [step for step in steps(options.device, out) if chosen(step, options.steps)]
    results = [run(step, python, out, deadline) for step in wanted]
    print()
    for step in wanted:
        for file in sorted(out.glob(step.figures)) if step.figures else ():
            print(file.read_text())
    print("| step | result | seconds |\n|---|---|---|")
    for step, (result, seconds) in zip(wanted, results, strict=True):
        print(f"| {step.name} | {result} | {seconds:.0f} |")
    return int(any(result != "done" for result, _ in results))


def chosen(step: Step, names: str) -> bool:
    """Whether `names` has this step; an empty text has all."""
    return not names or step.name in names.split(",")


def environment(folder: Path, wheels: Path) -> str:
    """A new environment in `folder` with the wheels before the packages of this Python; its executable."""
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "installed_before.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary)
        for file in sorted(wheels.glob("*.tar.*")):
            with tarfile.open(file) as archive:
                archive.extractall(unpacked, filter="data")
        # A wheel beside the archives replaces the one of that name inside.
        for wheel in (*sorted(unpacked.glob("*.whl")), *sorted(wheels.glob("*.whl"))):
            with zipfile.ZipFile(wheel) as files:
                files.extractall(packages)
    return str(folder / "bin" / "python")


def run(step: Step, python: str, out: Path, deadline: float) -> tuple[str, float]:
    """Run one step and print the end of its output; returns its result and the seconds that it took."""
    began = time.monotonic()
    limit_s = min(step.limit_s, deadline - began)
    if limit_s < 5:
        return "no time left", 0.0
    print(f"\n== {step.name}, at most {limit_s:.0f} s", flush=True)
    log = out / f"{step.name}.log"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, *step.command],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=environ,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
            result = "done" if not status else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            result = "out of time"
        finally:
            # Servers and clients that the step started are in the same process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(line[:400] for line in lines[-SHOWN_LINES:]))
    return result, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
