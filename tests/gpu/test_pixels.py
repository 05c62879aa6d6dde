"""On a real GPU: pictures for inputs of floats, whose pixels are normalised there.

Without an NVIDIA driver there is nothing to test here; what is decided about GPUs is tested with fake ones.
"""

from __future__ import annotations

import importlib
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.system.gpus import cuda_driver
from onnx import TensorProto, helper
from PIL import Image

from tests.conftest import Serve
from tests.gpu.test_gpu import node, pytorch, value, write

NO_GPU = cuda_driver().unavailable_reason()
pytestmark = pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")

COLOURS = "[image]\nsize = [24, 20]\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n"
GREY = '[image]\nmode = "grey"\nsize = [8, 8]\nmean = 0.5\nstd = 0.25\n'


def picture(seed: int, height: int, width: int) -> tuple[bytes, Any]:
    """A PNG, and its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), pixels


def ask_at_once(server: Any, bodies: list[tuple[bytes, Any]], output: str) -> None:
    """Every picture and its numbers, in threads of their own: each pair has one answer, exactly."""
    wrong: list[Any] = []
    version = server.get("/models/m/1").json()
    name = version["inputs"][0]["name"]

    def ask(body: bytes, rows: Any) -> None:
        seen = server.post("/predict/m", content=body, headers={"content-type": "image/png"})
        given = server.post("/predict/m", json={"inputs": {name: rows.tolist()}})
        pair = tuple(answer.json()["outputs"][output] for answer in (seen, given))
        # In a batch of another size a runtime may add up in another order.
        if not np.allclose(pair[0], pair[1], rtol=1e-4, atol=1e-5):
            wrong.append(pair)

    threads = [threading.Thread(target=ask, args=pair) for pair in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("config", ["", "[gpu]\ngraphs = false\n", "[gpu]\nfp16 = true\n"])
def test_onnx_models_get_the_bits_that_the_codec_would_give(
    config: str, serve: Serve, tmp_path: Path
) -> None:
    """Of every pixel, for the output is the input; replayed and not, padded and not, beside numbers."""
    graph = helper.make_graph(
        [node("Identity", ["x"], ["y"])], "g", [value("x", ["n", 3, 24, 20])], [value("y", ["n", 3, 24, 20])]
    )
    write(tmp_path / "repository" / "m", graph, COLOURS + config)
    server = serve(tmp_path / "repository", "--devices", "cuda:0")
    version = server.get("/models/m/1").json()
    assert version["state"] == "ready", version["reason"]
    assert version["gpu"]["pixels"] == "normalised on cuda:0"
    bodies = []
    for seed in range(16):
        body, pixels = picture(seed, 24, 20)
        scaled = (pixels * (1 / 255) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        rows = np.moveaxis(scaled, -1, 0)[np.newaxis].astype(np.float32)
        answer = server.post("/predict/m", content=body, headers={"content-type": "image/png"})
        found = np.array(answer.json()["outputs"]["y"], np.float32)
        if "fp16" in config:
            np.testing.assert_allclose(found, rows, rtol=1e-3, atol=1e-3)
        else:
            assert found.tobytes() == rows.tobytes()
        bodies.append((body, rows))
    ask_at_once(server, bodies, "y")


def test_fp16_and_fp64_inputs_are_normalised_on_a_gpu(serve: Serve, tmp_path: Path) -> None:
    for name, element in (("half", TensorProto.FLOAT16), ("double", TensorProto.DOUBLE)):
        ends = [value("x", ["n", 3, 24, 20], element)], [value("y", ["n", 3, 24, 20], element)]
        graph = helper.make_graph([node("Identity", ["x"], ["y"])], "g", *ends)
        write(tmp_path / "repository" / name, graph, COLOURS)
    server = serve(tmp_path / "repository", "--devices", "cuda:0")
    body, pixels = picture(1, 24, 20)
    scaled = np.moveaxis((pixels * (1 / 255) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], -1, 0)[
        np.newaxis
    ]
    for name, dtype in (("half", np.float16), ("double", np.float64)):
        assert server.get(f"/models/{name}/1").json()["gpu"]["pixels"] == "normalised on cuda:0"
        answer = server.post(f"/predict/{name}", content=body, headers={"content-type": "image/png"})
        assert np.array(answer.json()["outputs"]["y"], dtype).tolist() == scaled.astype(dtype).tolist()


@pytest.mark.parametrize("config", ["", "[gpu]\ngraphs = false\n"])
def test_pytorch_models_give_the_same_outputs_for_pictures(config: str, serve: Serve, tmp_path: Path) -> None:
    torch = pytorch()
    networks = importlib.import_module("tests.backends.torch.networks")
    network = networks.digits()
    folder = tmp_path / "repository" / "m" / "1"
    folder.mkdir(parents=True)
    networks.save_exported(folder / "model.pt2", network, torch.rand(2, 1, 8, 8))
    (folder.parent / "model.toml").write_text(GREY + config)
    server = serve(tmp_path / "repository", "--devices", "cuda:0", "--trust")
    version = server.get("/models/m/1").json()
    assert version["state"] == "ready", version["reason"]
    assert version["gpu"]["pixels"] == "normalised on cuda:0"
    assert version["gpu"]["graphs"] == ("none were asked for" if config else True)
    [output] = (item["name"] for item in version["outputs"])
    bodies = []
    for seed in range(16):
        body, pixels = picture(seed, 8, 8)
        grey = np.asarray(Image.fromarray(pixels).convert("L"))
        rows = ((grey * (1 / 255) - 0.5) / 0.25)[np.newaxis, np.newaxis].astype(np.float32)
        answer = server.post("/predict/m", content=body, headers={"content-type": "image/png"})
        with torch.inference_mode():
            expected = network(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(
            answer.json()["outputs"][output], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
        )
        bodies.append((body, rows))
    ask_at_once(server, bodies, output)
