"""Measures rows a second of PyTorch models in the pool, beside the best loop around the same module.

    python benchmarks/torch_backends.py [--network digits|resnet50] [--seconds S] [--rounds N]

Each network is written as ONNX, TorchScript and exported program with the same weights. The server's
loader loads it with its proof, its measurements and its plan, and one thread keeps it busy with entries.
The loop for comparison calls the module with a full batch, eager and as frozen TorchScript, with one
thread and with all threads, at its fastest batch size. Loops and pools take turns. Figures are medians
over the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The server does the same before it imports PyTorch. Without this, the threads of the loops would spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Entry, Result, VersionKey
from inferpool.repository.config import read_config
from inferpool.repository.load.loader import LoadedVersion, Loader
from inferpool.settings import Settings
from inferpool.system.cpu import usable_cores
from inferpool.system.memory import keep_freed_memory

from tests.backends.torch.networks import ROOT, configure, described, digits, save_exported, save_scripted

MOST_ROWS = 256


class Bottleneck(nn.Module):
    """A block of ResNet-50: 1×1, 3×3 and 1×1 convolutions around a shortcut (He et al., 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.narrow = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.middle = nn.Sequential(
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.widen = nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.widen(self.middle(self.narrow(input))) + self.shortcut(input))


def resnet50() -> nn.Module:
    """ResNet-50 with random weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)).eval()


class Outbox:
    """Hands results to the thread that offers."""

    def __init__(self) -> None:
        self.results: queue.SimpleQueue[Sequence[Result]] = queue.SimpleQueue()

    def ended(self, entry_ids: Sequence[int]) -> None:
        """The inputs are arrays of this process."""

    def put(self, results: Sequence[Result]) -> None:
        self.results.put(results)


class Pooled:
    """A model that the server's loader has loaded, kept busy with entries."""

    def __init__(self, file: Path, entry_rows: int, shape: tuple[int, ...]) -> None:
        self.outbox = Outbox()
        settings = Settings(trust=True, measure_ms=4000)
        loader = Loader(settings, self.outbox, Metrics({}), time.monotonic)
        self.key = VersionKey(file.parents[1].name, 1)
        folder = file.parents[1]
        self.loaded: LoadedVersion = loader.load(self.key, file, folder, read_config(folder / "model.toml"))
        (spec,) = self.loaded.view.signature.inputs
        self.inputs = {spec.name: np.random.default_rng(0).random((entry_rows, *shape), np.float32)}
        self.rows = entry_rows
        self.ids = itertools.count()

    def rate(self, seconds: float) -> float:
        """Return rows a second, with two full batches waiting for each instance."""
        plan = self.loaded.view
        waiting = max(2, 3 * plan.batching.max_rows * len(self.loaded.pool.instances()) // self.rows)
        for _ in range(waiting):
            self._offer()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            results = self.outbox.results.get()
            done += len(results)
            for result in results:
                assert result.error is None, result.error
                self._offer()
        took = time.perf_counter() - began
        while waiting:
            waiting -= len(self.outbox.results.get())
        return done * self.rows / took

    def _offer(self) -> None:
        nbytes = sum(tensor.nbytes for tensor in self.inputs.values())
        now = time.monotonic()
        self.loaded.pool.offer(Entry(next(self.ids), self.key, self.inputs, self.rows, 0, nbytes, now))

    @property
    def choice(self) -> str:
        """Return the plan in words."""
        view = self.loaded.view
        return (
            f"{view.backend}: batches of {view.batching.max_rows},"
            f" {len(self.loaded.pool.instances())} instances of {view.threads} threads"
        )


def loop_rate(
    module: Callable[[torch.Tensor], Any], batch: torch.Tensor, threads: int, seconds: float
) -> float:
    """Return rows a second of a loop that calls `module`."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for _ in range(3):
            module(batch)
        began, runs = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            module(batch)
            runs += 1
        return runs * len(batch) / (time.perf_counter() - began)


def best_size(
    module: Callable[[torch.Tensor], Any], shape: tuple[int, ...], threads: int, seconds: float
) -> torch.Tensor:
    """Return the batch of the fastest size; stop after three sizes that are not faster."""
    batches = [torch.rand(1, *shape)]
    rates = [loop_rate(module, batches[0], threads, seconds)]
    while len(batches[-1]) < MOST_ROWS and max(rates) > max(rates[:-3], default=0.0):
        batches.append(torch.rand(2 * len(batches[-1]), *shape))
        rates.append(loop_rate(module, batches[-1], threads, seconds))
    return batches[rates.index(max(rates))]


def write_onnx(network: nn.Module, file: Path, sample: torch.Tensor) -> None:
    """Write a network as ONNX: digits is copied from the repository, others pass PyTorch's exporter."""
    file.parent.mkdir(parents=True)
    if len(sample[0, :, 0, 0]) == 1:
        shutil.copy(ROOT / "models/digits/1/model.onnx", file)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (sample,),
            str(file),
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "rows"}, "output": {0: "rows"}},
        )


def measure(
    name: str, network: nn.Module, shape: tuple[int, ...], entry_rows: int, arguments: argparse.Namespace
) -> None:
    """Print the figures of one network."""
    sample = torch.rand(2, *shape)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_onnx(network, folder / "onnx/1/model.onnx", sample)
        script = save_scripted(folder / "torchscript/1/model.pt", network)
        configure(script, described(input=("FP32", [-1, *shape])))
        save_exported(folder / "program/1/model.pt2", network, sample)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frozen = torch.jit.freeze(torch.jit.load(script).eval())
        modules = {"eager PyTorch": network, "frozen TorchScript": frozen}
        loops = {}
        for (label, module), threads in itertools.product(modules.items(), sorted({1, usable_cores()})):
            batch = best_size(module, shape, threads, arguments.seconds / 8)
            loops[f"loop, {label}: batches of {len(batch)}, {threads} threads"] = (module, batch, threads)
        pools = {
            "ONNX": Pooled(folder / "onnx/1/model.onnx", entry_rows, shape),
            "TorchScript": Pooled(script, entry_rows, shape),
            "exported program": Pooled(folder / "program/1/model.pt2", entry_rows, shape),
        }
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for label, (module, batch, threads) in loops.items():
                rates.setdefault(label, []).append(loop_rate(module, batch, threads, arguments.seconds))
            for label, pool in pools.items():
                rates.setdefault(f"pool {label}", []).append(pool.rate(arguments.seconds))
        best = max(statistics.median(rates[label]) for label in loops)
        for label in loops:
            row(name, label, rates[label], best)
        for label, pool in pools.items():
            row(name, f"pool, {pool.choice}; entries of {entry_rows}", rates[f"pool {label}"], best)
            pool.loaded.pool.drain(5)


def row(network: str, what: str, rates: list[float], best: float) -> None:
    """Print a line of the table."""
    median = statistics.median(rates)
    spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
    print(f"| {network} | {what} | {median:,.0f} ({spread}) | {100 * median / best:.0f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=("digits", "resnet50"), help="one of them only")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the server does; loops have the good of it as well
    print(f"PyTorch {torch.__version__}, {usable_cores()} cores")
    print("| network | what | rows/s (least and most) | of the best loop |\n|---|---|---|---|")
    if arguments.network in (None, "digits"):
        measure("digits", digits(), (1, 8, 8), 64, arguments)
    if arguments.network in (None, "resnet50"):
        measure("ResNet-50", resnet50(), (3, 224, 224), 1, arguments)


if __name__ == "__main__":
    main()
