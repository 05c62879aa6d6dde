"""On a real GPU: CUDA graphs, captures beside requests, and TensorRT where it is installed.

Without an NVIDIA driver there is nothing to test here; what is decided about GPUs is tested with fake ones.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.backends.base import DeviceModel, GpuOptions, LoadOptions
from inferpool.backends.onnx.gpu.tensorrt import tensorrt_unavailable_reason
from inferpool.backends.registry import find_backend
from inferpool.optimise_command.gpu.tensorrt_form import time_on_gpu
from inferpool.optimise_command.model_folders import find_source
from inferpool.pool.buckets import BatchBuckets
from inferpool.release.optimise.timing import batches_of
from inferpool.repository.load.gpu.graph_capture import capture
from inferpool.settings import Settings
from inferpool.system.gpus import cuda_driver
from onnx import TensorProto, helper

from tests.conftest import Serve
from tests.gpu.test_gpu import DIGITS, copy_digits, images, node, value, write

NO_GPU = cuda_driver().unavailable_reason()
pytestmark = pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")


def answer(server: Any, model: str, rows: Any) -> Any:
    """The one output of `model` for `rows`."""
    name = server.get(f"/models/{model}/1").json()["inputs"][0]["name"]
    response = server.post(f"/predict/{model}", json={"inputs": {name: rows.tolist()}})
    assert response.status_code == 200, response.text
    [numbers] = response.json()["outputs"].values()
    return np.array(numbers)


def test_replayed_runs_give_the_outputs_of_plain_runs(serve: Serve, tmp_path: Path) -> None:
    """For rows that come and go, on every size of a batch, over and over."""
    repository = tmp_path / "repository"
    copy_digits(repository / "replayed")
    copy_digits(repository / "plain", "[gpu]\ngraphs = false")
    server = serve(repository, "--devices", "cuda:0", INFERPOOL_MEASURE_MS="2000")
    replayed = server.get("/models/replayed/1").json()
    assert replayed["state"] == "ready", replayed["reason"]
    assert replayed["gpu"]["graphs"] is True
    assert server.get("/models/plain/1").json()["gpu"]["graphs"] == "none were asked for"
    for count in (1, 2, 3, 5, 8, 13, 21, 34, 1, 55, 2) * 3:
        rows = images(count)
        np.testing.assert_allclose(
            answer(server, "replayed", rows), answer(server, "plain", rows), rtol=1e-4, atol=1e-4
        )


def test_a_model_that_cannot_be_captured_is_served_and_says_why(serve: Serve, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    places = [value("y", [2, "k"], TensorProto.INT64)]
    write(
        repository / "places",
        helper.make_graph([node("NonZero", ["x"], ["y"])], "g", [value("x", ["n", "m"])], places),
    )
    branch = [
        helper.make_graph([node(kind, ["x"], [f"{kind}y"])], kind, [], [value(f"{kind}y", ["n", 3])])
        for kind in ("Abs", "Neg")
    ]
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    condition = [node("ReduceSum", ["x"], ["all"], keepdims=0), node("Greater", ["all", "zero"], ["so"])]
    chosen = helper.make_node("If", ["so"], ["y"], then_branch=branch[0], else_branch=branch[1])
    write(
        repository / "chooses",
        helper.make_graph([*condition, chosen], "g", [value("x", ["n", 3])], [value("y", ["n", 3])], [zero]),
        '[gpu]\ncpu_nodes = "any"',
    )
    server = serve(repository, "--devices", "cuda:0")
    for model, reason in (
        ("places", 'the shape of output "y" is not known before the run'),
        ("chooses", "control flow|run on the CPU"),
    ):
        version = server.get(f"/models/{model}/1").json()
        assert version["state"] == "ready", version["reason"]
        assert isinstance(version["gpu"]["graphs"], str)
        assert any(part in version["gpu"]["graphs"] for part in reason.split("|")), version["gpu"]
    assert answer(server, "chooses", -np.ones((2, 3))).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert answer(server, "places", np.eye(2)).tolist() == [[0, 1], [0, 1]]


def test_captures_and_other_runs_do_not_disturb_each_other() -> None:
    """One thread loads models and captures, in CUDA's global mode, while another allocates and runs."""
    backend, file = find_backend("onnx"), DIGITS / "1" / "model.onnx"
    serving = backend.load(file, LoadOptions("cuda:0"))
    assert isinstance(serving, DeviceModel)
    name = serving.signature.inputs[0].name
    ended = threading.Event()
    runs: list[int] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            while not ended.is_set():
                # Most are shapes that have never run, for which the runtime allocates.
                runs.append(len(runs) % 500 + 1)
                serving.run({name: images(runs[-1])})
        except Exception as error:  # noqa: BLE001 - it is raised again by the test
            faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            model = backend.load(file, LoadOptions("cuda:0", gpu=GpuOptions(graphs=True)))
            assert isinstance(model, DeviceModel)
            capture(model, BatchBuckets([1, 2, 4, 8, 16, 32]), [])
            assert model.graphs.ok
            model.close()
    finally:
        ended.set()
        thread.join()
        serving.close()
    assert not faults
    assert len(runs) > 5


@pytest.mark.skipif(bool(tensorrt_unavailable_reason()), reason=str(tensorrt_unavailable_reason()))
def test_tensorrt_takes_over_from_cuda(serve: Serve, tmp_path: Path) -> None:
    """While its engine is built, CUDA answers."""
    repository = tmp_path / "repository"
    copy_digits(repository / "m", "[gpu]\ntensorrt = true")
    copy_digits(repository / "cuda")
    server = serve(repository, "--devices", "cuda:0")
    assert server.get("/models/m/1").json()["state"] == "ready"
    rows = images(7)
    expected = answer(server, "cuda", rows)
    np.testing.assert_allclose(answer(server, "m", rows), expected, rtol=1e-3, atol=1e-3)
    server.wait_for("TensorRT takes over|no TensorRT", 900)
    assert server.get("/models/m/1").json()["gpu"]["tensorrt"] == "TensorRT serves"
    for count in (7, 1, 30, 7):
        rows = images(count)
        np.testing.assert_allclose(
            answer(server, "m", rows), answer(server, "cuda", rows), rtol=1e-3, atol=1e-3
        )


@pytest.mark.skipif(bool(tensorrt_unavailable_reason()), reason=str(tensorrt_unavailable_reason()))
def test_optimise_times_tensorrt_beside_cuda(tmp_path: Path) -> None:
    batches = batches_of([{"image": images(8)}])
    source = find_source(DIGITS, None)
    timed, reasons = time_on_gpu(source, batches, tmp_path, Settings(), lambda count: None)
    assert reasons == {"cuda": "what tensorrt is compared with"}
    assert timed.keys() == {"cuda", "tensorrt"}
