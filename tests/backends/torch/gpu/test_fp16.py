"""Models of PyTorch in FP16, as they are loaded for GPUs; the CPU's operations know FP16, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inferpool.backends.base import GpuOptions, LoadedModel, LoadOptions, TensorHint
from inferpool.backends.torch.backend import PyTorchBackend
from inferpool.errors import LoadError
from inferpool.tensors import Array
from torch import nn

from tests.backends.torch.networks import digits, eager, save_exported, save_scripted, save_traced

X = TensorHint("x", "FP32", (-1, 4))
IMAGE = TensorHint("input", "FP32", (-1, 1, 8, 8))


def load(file: Path, *inputs: TensorHint, fp16: bool = True) -> LoadedModel:
    return PyTorchBackend().load(file, LoadOptions(trusted=True, inputs=inputs, gpu=GpuOptions(fp16=fp16)))


def images(count: int) -> Array:
    return np.random.default_rng(count).random((count, 1, 8, 8)).astype(np.float32)


def as_script(folder: Path) -> tuple[Path, TensorHint]:
    return save_scripted(folder / "m.pt", digits()), IMAGE


def as_trace(folder: Path) -> tuple[Path, TensorHint]:
    return save_traced(folder / "m.pt", digits(), torch.rand(2, 1, 8, 8)), IMAGE


def as_program(folder: Path) -> tuple[Path, TensorHint]:
    return save_exported(folder / "m.pt2", digits(), torch.rand(2, 1, 8, 8)), IMAGE


@pytest.mark.parametrize("save", [as_script, as_trace, as_program])
def test_an_fp16_model_keeps_its_input_and_output_datatypes(
    save: Callable[[Path], tuple[Path, TensorHint]], tmp_path: Path
) -> None:
    """The answers are rounded, and no further from FP32 than that explains."""
    file, described = save(tmp_path)
    inputs = () if file.suffix == ".pt2" else (described,)
    exact, half = load(file, *inputs, fp16=False), load(file, *inputs)
    assert half.signature == exact.signature
    assert half.form == exact.form
    rows = {half.signature.inputs[0].name: images(9)}
    [name] = half.signature.outputs_by_name
    got, want = half.run(rows)[name], exact.run(rows)[name]
    assert got.dtype == np.float32
    assert 1e-5 < np.abs(got - want).max() / np.abs(want).max() < 5e-3


class Masking(nn.Module):
    """The parts of exported attention: FP32 by name, its smallest number, integers, a state."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.register_buffer("shift", torch.full((4,), 0.25))

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.dense(x) + self.shift
        y = y.masked_fill(kept == 0, torch.finfo(torch.float32).min)
        weights = y.softmax(1, dtype=torch.float32).to(torch.float32)
        bias = torch.zeros(4, dtype=torch.float32) + torch.arange(4, dtype=torch.float32)
        return {"weights": weights @ self.dense.weight + bias, "best": y.argmax(1)}


def test_fp32_literals_become_fp16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Masking().eval()
    x, kept = torch.rand(2, 4), torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]])
    half = load(save_exported(tmp_path / "m.pt2", network, x, kept))
    assert half.form == "exported program"
    rng = np.random.default_rng(1)
    rows = {"x": rng.random((7, 4)).astype(np.float32), "kept": np.tile([[1, 0, 1, 1]], (7, 1))}
    answer, want = half.run(rows), eager(network, rows)
    assert answer["weights"].dtype == np.float32
    np.testing.assert_allclose(answer["weights"], want["weights"], atol=5e-3)
    assert answer["best"].dtype == np.int64
    assert answer["best"].tolist() == want["best"].tolist()


class Stubborn(nn.Module):
    """Brings a matrix of FP32 that is no weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(4, 2)


class Scale(nn.Module):
    """Gives FP16 and FP32 of its own accord."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * self.factor
        return y, y.half()


def test_a_script_that_does_not_run_in_fp16_is_refused(tmp_path: Path) -> None:
    file = save_scripted(tmp_path / "m.pt", Stubborn())
    assert load(file, X, fp16=False).run({"x": np.ones((1, 4), np.float32)})["output_0"].tolist() == [[4, 4]]
    with pytest.raises(LoadError, match=r"the model does not run in FP16 \(.+\): an FP32 tensor in it is no"):
        load(file, X)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_fp16_outputs_stay_fp16(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"m{suffix}"
    save: Any = save_scripted if suffix == ".pt" else save_exported
    save(file, Scale(), *(() if suffix == ".pt" else (torch.rand(2, 4),)))
    half = load(file, *((X,) if suffix == ".pt" else ()))
    assert [spec.datatype for spec in half.signature.outputs] == ["FP32", "FP16"]
    answer = half.run({"x": np.full((3, 4), 0.5, np.float32)})
    assert [tensor.dtype for tensor in answer.values()] == [np.float32, np.float16]
    assert all(tensor.tolist() == [[1.0] * 4] * 3 for tensor in answer.values())
