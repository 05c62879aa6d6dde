"""Models of PyTorch with memory of their own: the same class as on a GPU, with the CPU as the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inferpool.backends.base import LoadOptions
from inferpool.backends.torch.backend import PyTorchBackend
from inferpool.backends.torch.gpu.device_model import TorchDeviceModel
from inferpool.backends.torch.model import InputTensors, OutputTree, Runnable, StartedModel
from inferpool.errors import LoadError, OutOfMemory
from inferpool.tensors import Array, TensorSpec

from tests.backends.torch.networks import digits, save_exported

X = TensorSpec("x", "FP32", (-1, 1, 8, 8))
SCORES = TensorSpec("scores", "FP32", (-1, 10))


Specs = Mapping[Any, TensorSpec]


def bound(forward: Any, inputs: tuple[TensorSpec, ...], outputs: Specs) -> TorchDeviceModel:
    runnable = Runnable(forward, inputs, "a form", copies=False)
    return TorchDeviceModel(StartedModel(runnable, outputs), "cpu")


@pytest.fixture(scope="module")
def model() -> TorchDeviceModel:
    network = digits()
    return bound(lambda feeds: {(): network(feeds["x"])}, (X,), {(): SCORES})


def images(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).random((count, 1, 8, 8)).astype(np.float32)


def test_padded_rows_are_cut_off_the_outputs(model: TorchDeviceModel) -> None:
    """As the network gives them, whatever ran in the same memory before and after."""
    network = digits()
    kept = []
    for counts in ((5, 2, 1), (3,), (8,), (1, 1)):
        parts = [{"x": images(count, seed)} for seed, count in enumerate(counts)]
        whole = np.concatenate([part["x"] for part in parts])
        with torch.inference_mode():
            expected = network(torch.from_numpy(whole)).numpy()
        kept.append((model.run_padded(parts, 8)["scores"], expected))
    for answer, expected in kept:
        assert answer.shape == expected.shape
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)


def test_a_run_without_padding_gives_the_same_outputs(model: TorchDeviceModel) -> None:
    rows = images(4, 9)
    alone = model.run({"x": rows}, ["scores"])
    np.testing.assert_allclose(
        alone["scores"], model.run_padded([{"x": rows}], 4)["scores"], rtol=1e-5, atol=1e-5
    )


def test_padding_is_zero() -> None:
    """Also of BF16, which numpy has as bits, and after a batch that filled the memory."""
    seen: list[torch.Tensor] = []

    def forward(feeds: InputTensors) -> OutputTree:
        seen.append(feeds["x"].clone())
        return {(): feeds["x"]}

    spec = TensorSpec("x", "BF16", (-1,))
    echo = bound(forward, (spec,), {(): TensorSpec("y", "BF16", (-1,))})
    ones = np.full(4, 0x3F80, np.uint16)
    echo.run_padded([{"x": ones}], 4)
    assert echo.run_padded([{"x": ones[:1]}], 4)["y"].tolist() == [0x3F80]
    assert seen[-1].dtype is torch.bfloat16
    assert seen[-1].tolist() == [1, 0, 0, 0]


def test_out_of_memory_is_distinguished_from_other_errors() -> None:
    def full(feeds: InputTensors) -> OutputTree:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(feeds: InputTensors) -> OutputTree:
        raise RuntimeError("something else")

    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        bound(full, (X,), {(): SCORES}).run({"x": images(1, 0)})
    with pytest.raises(RuntimeError, match="something else"):
        bound(broken, (X,), {(): SCORES}).run_padded([{"x": images(1, 0)}], 2)


def test_close_releases_the_module_and_its_memory() -> None:
    released: list[bool] = []
    runnable = Runnable(
        lambda feeds: {(): feeds["x"]}, (X,), "", copies=False, release=lambda: released.append(True)
    )
    echo = TorchDeviceModel(StartedModel(runnable, {(): X}), "cpu")
    echo.run({"x": images(1, 0)})
    echo.close()
    assert released == [True]
    assert not echo._buffers


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch for GPUs is installed")
def test_a_pytorch_for_cpus_is_the_reason_why_no_gpu_is_used(tmp_path: Path) -> None:
    file = save_exported(tmp_path / "model.pt2", torch.nn.Linear(3, 2), torch.rand(2, 3))
    assert "built for CPUs only" in str(PyTorchBackend().gpu_unavailable_reason(file))
    with pytest.raises(LoadError, match="is built for CPUs only"):
        PyTorchBackend().load(file, LoadOptions(device="cuda:0", trusted=True))
