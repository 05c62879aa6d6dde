"""On a real GPU: what runs there, that it answers as the CPU does, and what it gives back.

Without an NVIDIA driver there is nothing to test here; what is decided about GPUs is tested with fake ones.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.backends.base import DeviceModel, GpuOptions, LoadOptions
from inferpool.backends.registry import find_backend
from inferpool.observe.gpu_metrics import gpu_readings
from inferpool.pool.buckets import BatchBuckets
from inferpool.repository.load.gpu.graph_capture import capture
from inferpool.system.gpus import cuda_driver
from onnx import TensorProto, helper

from tests.conftest import Serve
from tests.server import ROOT

NO_GPU = cuda_driver().unavailable_reason()
pytestmark = pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")

DIGITS = ROOT / "models" / "digits"
node = helper.make_node


def value(name: str, shape: list[Any], element: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, element, shape)


def write(folder: Path, graph: Any, config: str = "") -> None:
    """One version of an ONNX model."""
    (folder / "1").mkdir(parents=True)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    (folder / "1" / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.toml").write_text(config)


def copy_digits(folder: Path, config: str = "") -> None:
    """`models/digits` without its codecs."""
    (folder / "1").mkdir(parents=True)
    shutil.copy(DIGITS / "1" / "model.onnx", folder / "1" / "model.onnx")
    (folder / "model.toml").write_text(config)


def images(count: int) -> Any:
    return np.random.default_rng(count).random((count, 1, 8, 8)).astype(np.float32)


def used_bytes() -> int:
    """Memory of the first GPU that is in use, by the driver's count."""
    readings = gpu_readings(cuda_driver().gpus())
    assert readings is not None
    told = {name: number for name, labels, number in readings() if labels == ("cuda:0",)}
    return int(told["gpu_memory_used_bytes"])


def test_a_model_on_the_gpu_answers_as_on_the_cpu_padded_or_not(serve: Serve, tmp_path: Path) -> None:
    """Every number of rows up to beyond the largest batch; nothing of it runs on the CPU."""
    repository = tmp_path / "repository"
    copy_digits(repository / "there")
    copy_digits(repository / "here", '[instances]\ndevices = ["cpu"]')
    server = serve(repository, "--devices", "cuda:0", INFERPOOL_MEASURE_MS="2000")
    version = server.get("/models/there/1").json()
    assert version["state"] == "ready", version["reason"]
    assert {item["device"] for item in version["instances"]} == {"cuda:0"}
    assert version["gpu"]["cpu_nodes"] == {}
    assert version["gpu"]["padding"].startswith("batches are rounded up"), version["gpu"]
    name = version["inputs"][0]["name"]
    most = version["batching"]["max_rows"]
    for count in (1, 3, 7, most - 1, most, 2 * most + 1):
        body = {"inputs": {name: images(max(1, count)).tolist()}}
        there, here = (
            server.post(f"/predict/{model}", json=body).json()["outputs"] for model in ("there", "here")
        )
        for output, numbers in there.items():
            np.testing.assert_allclose(numbers, here[output], rtol=1e-3, atol=1e-3)
    assert server.metric("padded_rows_total", model="there") > 0
    assert server.metric("cpu_nodes", model="there") == 0
    for metric in ("gpu_memory_used_bytes", "gpu_memory_total_bytes", "gpu_temperature_celsius"):
        assert server.metric(metric, device="cuda:0") > 0


def test_nodes_without_a_kernel_for_the_gpu_have_to_be_allowed(serve: Serve, tmp_path: Path) -> None:
    """`Unique` has none: refused by name, served where it is allowed, and counted."""
    graph = helper.make_graph(
        [node("Relu", ["x"], ["positive"]), node("Unique", ["positive"], ["y"])],
        "g",
        [value("x", ["n"])],
        [value("y", ["k"])],
    )
    repository = tmp_path / "repository"
    write(repository / "refused", graph)
    write(repository / "allowed", graph, '[gpu]\ncpu_nodes = "any"')
    server = serve(repository, "--devices", "cuda:0")
    refused = server.get("/models/refused/1").json()
    assert refused["state"] == "failed"
    assert "1 nodes would run on the CPU: 1 Unique" in refused["reason"]
    allowed = server.get("/models/allowed/1").json()
    assert allowed["state"] == "ready", allowed["reason"]
    assert allowed["gpu"]["cpu_nodes"] == {"Unique": 1}
    assert server.metric("cpu_nodes", model="allowed") == 1
    answer = server.post("/predict/allowed", json={"inputs": {"x": [3, -1, 2, 3]}})
    assert answer.json()["outputs"]["y"] == [0, 2, 3]


def test_without_memory_for_large_batches_smaller_ones_run(serve: Serve, tmp_path: Path) -> None:
    """A row takes 4 MiB on the way; with 256 MiB for each copy the largest bucket is limited by memory."""
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [1, 1024], [1.0] * 1024)
    graph = helper.make_graph(
        [
            node("Unsqueeze", ["x", "last"], ["columns"]),
            node("Mul", ["columns", "ones"], ["square"]),
            node("Exp", ["square"], ["grown"]),
            node("ReduceSum", ["grown", "both"], ["y"], keepdims=0),
        ],
        "g",
        [value("x", ["n", 1024])],
        [value("y", ["n"])],
        [
            ones,
            helper.make_tensor("last", TensorProto.INT64, [1], [2]),
            helper.make_tensor("both", TensorProto.INT64, [2], [1, 2]),
        ],
    )
    config = f"[gpu]\nmemory_bytes = {256 * 2**20}\n[batching]\nmax_rows = 64"
    write(tmp_path / "repository" / "m", graph, config)
    server = serve(tmp_path / "repository", "--devices", "cuda:0", INFERPOOL_MEASURE_MS="0")
    version = server.get("/models/m/1").json()
    assert version["state"] == "ready", version["reason"]
    assert 1 <= version["gpu"]["batch_rows"][-1] < 64
    rows = [[0.0] * 1024] * 64
    assert server.post("/predict/m", json={"inputs": {"x": rows}}).json()["outputs"]["y"] == [2.0**20] * 64


def test_the_differences_of_tf32_are_shown(serve: Serve, tmp_path: Path) -> None:
    copy_digits(tmp_path / "repository" / "m", "[gpu]\ntf32 = true")
    server = serve(tmp_path / "repository", "--devices", "cuda:0")
    version = server.get("/models/m/1").json()
    assert version["state"] == "ready", version["reason"]
    assert version["gpu"]["precision"].startswith("TF32; its outputs differ from those of FP32 by ")


def test_fp16_runs_on_a_gpu_and_its_differences_are_shown(serve: Serve, tmp_path: Path) -> None:
    """The converted graph has kernels for all of its nodes, and is replayed as FP32 is."""
    repository = tmp_path / "repository"
    copy_digits(repository / "half", "[gpu]\nfp16 = true")
    copy_digits(repository / "exact")
    server = serve(repository, "--devices", "cuda:0")
    version = server.get("/models/half/1").json()
    assert version["state"] == "ready", version["reason"]
    assert version["gpu"]["cpu_nodes"] == {}
    assert version["gpu"]["graphs"] is True
    assert version["gpu"]["precision"].startswith("FP16; its outputs differ from those of FP32 by ")
    assert 0 < version["gpu"]["difference"]["relative"] < 0.01
    assert version["batching"]["enabled"], version["batching"]["reason"]
    name = version["inputs"][0]["name"]
    for count in (1, 5, version["batching"]["max_rows"] + 1):
        body = {"inputs": {name: images(count).tolist()}}
        half, exact = (
            np.array(server.post(f"/predict/{model}", json=body).json()["outputs"]["logits"])
            for model in ("half", "exact")
        )
        assert 0 < np.abs(half - exact).max() < 0.01 * np.abs(exact).max()


def test_fp16_that_loses_numbers_has_failed(serve: Serve, tmp_path: Path) -> None:
    """The square of 1000 is more than FP16 has."""
    thousand = helper.make_tensor("thousand", TensorProto.FLOAT, [1], [1000.0])
    graph = helper.make_graph(
        [node("Add", ["x", "thousand"], ["large"]), node("Mul", ["large", "large"], ["y"])],
        "g",
        [value("x", ["n", 4])],
        [value("y", ["n", 4])],
        [thousand],
    )
    write(tmp_path / "repository" / "m", graph, "[gpu]\nfp16 = true")
    server = serve(tmp_path / "repository", "--devices", "cuda:0")
    version = server.get("/models/m/1").json()
    assert version["state"] == "failed"
    assert 'in FP16 output "y" is not finite in 32 of 32 numbers' in version["reason"]


def test_close_frees_the_memory_of_a_model() -> None:
    """By the driver's count, but for what CUDA itself keeps in a process that has used it."""
    backend = find_backend("onnx")
    options = LoadOptions(device="cuda:0")
    first = backend.load(DIGITS / "1" / "model.onnx", options)
    assert isinstance(first, DeviceModel)
    name = first.signature.inputs[0].name
    first.run_padded([{name: images(3)}], 4)
    first.close()
    del first
    before = used_bytes()
    second = backend.load(DIGITS / "1" / "model.onnx", options)
    assert isinstance(second, DeviceModel)
    second.run_padded([{name: images(4096)}], 4096)
    during = used_bytes()
    second.close()
    del second
    assert during > before
    assert used_bytes() - before < (during - before) / 4


def pytorch() -> Any:
    """PyTorch with CUDA, or the test is skipped."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("the PyTorch that is installed is the one for CPUs")
    return torch


IMAGES = '[[inputs]]\nname = "input"\ndatatype = "FP32"\nshape = [-1, 1, 8, 8]\n'


@pytest.mark.parametrize("config", ["", "[gpu]\nfp16 = true\n", "[gpu]\ngraphs = false\n"])
@pytest.mark.parametrize("kind", ["script", "program"])
def test_pytorch_runs_on_a_gpu(kind: str, config: str, serve: Serve, tmp_path: Path) -> None:
    """TorchScript and exported programs answer as on the CPU, replayed or not, and in FP16 nearly so."""
    torch = pytorch()
    networks = importlib.import_module("tests.backends.torch.networks")
    network = networks.digits()
    folder = tmp_path / "repository" / "m" / "1"
    folder.mkdir(parents=True)
    if kind == "script":
        networks.save_scripted(folder / "model.pt", network)
        config += IMAGES
    else:
        networks.save_exported(folder / "model.pt2", network, torch.rand(2, 1, 8, 8))
    (folder.parent / "model.toml").write_text(config)
    server = serve(tmp_path / "repository", "--devices", "cuda:0", "--trust")
    version = server.get("/models/m/1").json()
    assert version["state"] == "ready", version["reason"]
    assert {item["device"] for item in version["instances"]} == {"cuda:0"}
    assert version["gpu"]["graphs"] == ("none were asked for" if "graphs" in config else True)
    tolerance = 1e-2 if "fp16" in config else 1e-3
    if "fp16" in config:
        assert 0 < version["gpu"]["difference"]["relative"] < tolerance
    for count in (1, 5, version["batching"]["max_rows"] + 1):
        rows = images(count)
        answer = server.post("/predict/m", json={"inputs": {version["inputs"][0]["name"]: rows.tolist()}})
        [numbers] = answer.json()["outputs"].values()
        with torch.inference_mode():
            expected = network(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(numbers, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_a_model_that_cannot_be_recorded_is_served_with_a_reason(serve: Serve, tmp_path: Path) -> None:
    """How many rows come out only the data say, and the host has to know it in the middle of the run."""
    pytorch()
    networks = importlib.import_module("tests.backends.torch.networks")
    folder = tmp_path / "repository" / "m" / "1"
    folder.mkdir(parents=True)
    networks.save_scripted(folder / "model.pt", networks.Chosen())
    (folder.parent / "model.toml").write_text('[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 2]\n')
    server = serve(tmp_path / "repository", "--devices", "cuda:0", "--trust")
    version = server.get("/models/m/1").json()
    assert version["state"] == "ready", version["reason"]
    assert version["gpu"]["graphs"] == "aten::nonzero waits for the device in the middle of a run"
    answer = server.post("/predict/m", json={"inputs": {"x": [[0, 0], [1, 2]]}})
    assert [*answer.json()["outputs"].values()] == [[[1, 2]]]


def test_close_frees_the_memory_of_a_pytorch_model_and_its_graphs(tmp_path: Path) -> None:
    """By the driver's count, after every batch size was recorded."""
    torch = pytorch()
    networks = importlib.import_module("tests.backends.torch.networks")
    file = networks.save_exported(tmp_path / "m.pt2", networks.digits(), torch.rand(2, 1, 8, 8))
    options = LoadOptions(device="cuda:0", trusted=True, gpu=GpuOptions(graphs=True))

    def used_by(rows: int) -> tuple[int, int]:
        """Bytes in use while a model is there that has run so many rows, and after."""
        model = find_backend("torch").load(file, options)
        assert isinstance(model, DeviceModel)
        capture(model, BatchBuckets((rows // 2, rows)), [])
        assert model.graphs.ok, model.graphs
        during = used_bytes()
        model.close()
        return during, used_bytes()

    _, before = used_by(8)
    during, after = used_by(16384)
    assert during > before
    assert after - before < (during - before) / 4
