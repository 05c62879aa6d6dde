"""Networks of PyTorch for the tests, and the ways to write them to files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx import numpy_helper
from torch import nn

ROOT: Final = Path(__file__).parents[3]
ROWS: Final = torch.export.Dim("rows")

TRUSTED = "--trust"


def digits() -> nn.Module:
    """The network of `models/digits` with its weights."""
    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(1, 16, 3, padding=1))
    network.add_module("relu1", nn.ReLU())
    network.add_module("conv2", nn.Conv2d(16, 32, 3, padding=1))
    network.add_module("relu2", nn.ReLU())
    network.add_module("pool", nn.MaxPool2d(2))
    network.add_module("flatten", nn.Flatten())
    network.add_module("dense1", nn.Linear(32 * 4 * 4, 64))
    network.add_module("relu3", nn.ReLU())
    network.add_module("dense2", nn.Linear(64, 10))
    graph = onnx.load(ROOT / "models/digits/1/model.onnx").graph
    weights = {item.name: torch.tensor(numpy_helper.to_array(item)) for item in graph.initializer}
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return network.eval()


class Mixed(nn.Module):
    """Two inputs, one by keyword, and a dict of a tensor and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.dense(x) * scale[:, None]
        return {"scores": y.softmax(1), "best": y.argmax(1)}


class Collatz(nn.Module):
    """Steps of 3n+1 until 1, a row at a time: how long it runs depends on the data."""

    def forward(self, n: torch.Tensor) -> torch.Tensor:
        steps = torch.zeros_like(n)
        for row in range(n.size(0)):
            value = int(n[row, 0])
            while value > 1:
                value = value // 2 if value % 2 == 0 else 3 * value + 1
                steps[row, 0] += 1
        return steps


class Chosen(nn.Module):
    """Rows that have something in them: how many, only their contents say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[torch.nonzero(x.sum(1))[:, 0]]


class Dropout(nn.Module):
    """Dropout that stays on, whatever the mode of the module is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, True)


class Centred(nn.Module):
    """Takes away the mean over the rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


def save_scripted(file: Path, module: nn.Module) -> Path:
    """Write a module as TorchScript, compiled from its source."""
    with quiet():
        torch.jit.save(torch.jit.script(module), _place(file))
    return file


def save_traced(file: Path, module: nn.Module, *inputs: torch.Tensor, **keywords: torch.Tensor) -> Path:
    """Write a module as TorchScript, as it ran with these inputs."""
    with quiet():
        traced = torch.jit.trace(
            module,
            inputs or None,
            example_kwarg_inputs=keywords or None,
            strict=False,
            check_trace=False,
        )
        torch.jit.save(traced, _place(file))
    return file


def export(module: nn.Module, *inputs: Any, shapes: Any = None, **keywords: Any) -> Any:
    """The exported program of a module whose tensors all have rows first, or as `shapes` says."""
    if shapes is None:
        shapes = torch.utils._pytree.tree_map(lambda _: {0: ROWS}, (tuple(inputs), keywords))
        shapes = (*shapes[0], *shapes[1].values())
    with quiet():
        return torch.export.export(module, inputs, keywords, dynamic_shapes=shapes)


def save_exported(file: Path, module: nn.Module, *inputs: Any, shapes: Any = None, **keywords: Any) -> Path:
    """Write a module as an exported program."""
    with quiet():
        torch.export.save(export(module, *inputs, shapes=shapes, **keywords), _place(file))
    return file


def configure(file: Path, text: str) -> None:
    """Write the `model.toml` of the model that a version's file belongs to."""
    (file.parents[1] / "model.toml").write_text(text)


def described(table: str = "inputs", **tensors: tuple[str, list[int]]) -> str:
    """The lines of a `model.toml` that describe tensors."""
    return "".join(
        f'[[{table}]]\nname = "{name}"\ndatatype = "{datatype}"\nshape = {shape}\n'
        for name, (datatype, shape) in tensors.items()
    )


def eager(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The module's outputs for arrays."""
    with torch.inference_mode():
        return module(**{name: torch.tensor(array) for name, array in inputs.items()})


def quiet() -> warnings.catch_warnings[None]:
    """Let PyTorch warn of what it likes."""
    caught: warnings.catch_warnings[None] = warnings.catch_warnings(action="ignore")
    return caught


def _place(file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    return str(file)
