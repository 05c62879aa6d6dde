"""The calls of NVIDIA's libraries, against a library in C that has their functions and a host's memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from inferpool.backends.cuda.memory import CudaMemory
from inferpool.backends.onnx.gpu.bound_model import BoundModel
from inferpool.backends.onnx.signature import read_signature
from inferpool.errors import OutOfMemory
from inferpool.system.gpus import Gpu, _CudaDriver
from onnx import TensorProto, helper

from tests.server import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")

Redirect = Callable[..., ctypes.CDLL]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cuda") / "libfake.so"
    source = ROOT / "tests" / "fake_gpu" / "cuda.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", file, source], check=True)
    return file


@pytest.fixture
def opened(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace NVIDIA's libraries by a fresh fake; gives the names of the libraries that were opened."""
    asked: list[str] = []
    fresh = shutil.copy(library, tmp_path / "libfake.so")
    real = ctypes.CDLL

    def load(name: str, *rest: Any) -> ctypes.CDLL:
        asked.append(name)
        return real(str(fresh), *rest)

    monkeypatch.setattr(ctypes, "CDLL", load)
    return asked


def test_the_driver_lists_every_gpu_in_its_own_order(opened: list[str]) -> None:
    driver = _CudaDriver()
    assert opened == []
    assert (driver.unavailable_reason(), driver.cuda()) == (None, (13, 2))
    first = "00102030-4050-6070-8090-a0b0c0d0e0f0"
    second = "01112131-4151-6171-8191-a1b1c1d1e1f1"
    assert driver.gpus() == [
        Gpu(0, "NVIDIA First", first, 2**37),
        Gpu(1, "NVIDIA Second", second, 2**38),
    ]
    assert opened == ["libcuda.so.1"]


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        ("100", "NVIDIA's driver shows this process no GPU; CUDA_VISIBLE_DEVICES is ''"),
        ("803", "NVIDIA's driver cannot be used: system has unsupported display driver / cuda driver"
                " combination (CUDA error 803)"),
    ],
)  # fmt: skip
def test_an_unusable_driver_gives_the_reason(
    status: str, fault: str, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUINIT", status)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    driver = _CudaDriver()
    assert driver.unavailable_reason() == fault
    assert driver.gpus() == []


def test_copies_are_complete_after_wait_and_close_frees_all_memory(opened: list[str]) -> None:
    memory = CudaMemory(3, 13)
    assert opened == ["libcudart.so.13"]
    host, back = memory.host(1000), memory.host(1000)
    address = memory.device(1000)
    host[:] = np.arange(1000) % 251
    memory.upload(address, host)
    memory.wait()
    memory.download(back[:500], address)
    memory.wait()
    assert back[:500].tolist() == host[:500].tolist()
    assert memory._library.fakeLeft() == 4
    memory.close()
    assert memory._library.fakeLeft() == 0


def test_a_failed_allocation_raises_out_of_memory(opened: list[str]) -> None:
    memory = CudaMemory(3, 13)
    for take in (memory.host, memory.device):
        with pytest.raises(OutOfMemory, match="CUDA: out of memory"):
            take(2**21)
    memory.close()
    with pytest.raises(RuntimeError, match=r"CUDA: unspecified \(error 1\)"):
        memory._check(1)


def test_only_an_error_that_stays_means_that_the_device_is_lost(opened: list[str]) -> None:
    memory = CudaMemory(3, 13)
    assert memory.lost() is None
    ctypes.c_int.in_dll(memory._library, "fakeFaults").value = 1
    assert memory.lost() is None
    ctypes.c_int.in_dll(memory._library, "fakeSticky").value = 700
    assert memory.lost() == "CUDA: unspecified (error 700)"


def test_a_session_reads_and_writes_the_memory(opened: list[str]) -> None:
    """ONNX Runtime on the CPU, for which the fake card's memory is as good as any: copies are in order."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("a", "b", "product")
    ]
    made = helper.make_graph([helper.make_node("Mul", ["a", "b"], ["product"])], "g", ends[:2], ends[2:])
    model = helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    memory = CudaMemory(3, 13)
    bound = BoundModel(session, read_signature(Path("unread"), session), "cpu", memory, {})
    rng = np.random.default_rng(0)
    for count in (8, 3, 5, 1, 8):
        parts = [
            {name: rng.random((rows, 3)).astype(np.float32) for name in ("a", "b")}
            for rows in (1, count - 1)
            if rows
        ]
        expected = np.concatenate([part["a"] * part["b"] for part in parts])
        assert bound.run_padded(parts, 8)["product"].tolist() == expected.tolist()
        assert bound.run(parts[-1])["product"].tolist() == (parts[-1]["a"] * parts[-1]["b"]).tolist()
    bound.close()
    assert memory._library.fakeLeft() == 0
