"""Models whose graphs are not read answer each request as they answer it alone; made-up inputs stay small."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto as Type
from onnx import helper

from tests.clients import Client, with_clients
from tests.conftest import Serve
from tests.onnx_models import write_session
from tests.server import Server

node, info = helper.make_node, helper.make_tensor_value_info
CLIENTS, ROUNDS = 8, 15
SAMPLE = [[100, 300]]
TAKES_FOUR = '[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 4]\n'


async def ask(name: str, rows: list[Any], right: list[Any], client: Client, number: int) -> None:
    """Send the rows in turn, and compare the answers with those that are right."""
    for turn in range(ROUNDS):
        which = (number + turn) % len(rows)
        reply = await client.post(f"/predict/{name}", json.dumps({"inputs": [rows[which]]}).encode())
        assert reply.status == 200, reply.body
        (answer,) = json.loads(reply.body)["outputs"].values()
        assert np.allclose(answer, right[which], rtol=1e-4, atol=1e-6), (name, which)


class ServedModels(NamedTuple):
    """A server of models of several kinds, and what gives their right answers."""

    server: Server
    modules: dict[str, Any]
    video: onnxruntime.InferenceSession
    codes: onnxruntime.InferenceSession

    def batching(self, name: str) -> Any:
        """How the server batches a model."""
        return self.server.get(f"/models/{name}/1").json()["batching"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, module_serve: Serve) -> ServedModels:
    torch = pytest.importorskip("torch")

    class Rescale(torch.nn.Module):  # type: ignore[misc, name-defined]
        """Divides by 255 if anything in the batch looks like a pixel of 0..255."""

        def forward(self, x):  # type: ignore[no-untyped-def]
            return x / 255 if bool(x.max() > 50) else x

    class Spare(torch.nn.Module):  # type: ignore[misc, name-defined]
        """Rows by themselves."""

        def forward(self, x):  # type: ignore[no-untyped-def]
            return torch.where(x.amax(dim=1, keepdim=True) > 50, x / 255, x)

    class Remembers(torch.nn.Module):  # type: ignore[misc, name-defined]
        """Adds up all rows that it has ever seen."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):  # type: ignore[no-untyped-def]
            self.seen.add_(x.sum(0))
            return x + self.seen

    folder = tmp_path_factory.mktemp("models")
    modules: dict[str, Any] = {"rescale": Rescale(), "spare": Spare(), "remembers": Remembers()}
    for name, module in modules.items():
        (folder / name / "1").mkdir(parents=True)
        with pytest.warns(DeprecationWarning, match="deprecated"):
            torch.jit.script(module).save(str(folder / name / "1" / "model.pt"))
        (folder / name / "model.toml").write_text(TAKES_FOUR)
    write_session(
        folder, "noise", [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])],
        info("x", Type.FLOAT, ["batch", 4]), info("y", Type.FLOAT, ["batch", 4]), {},
    )  # fmt: skip
    video = write_session(
        folder, "video", [node("Conv", ["x", "w"], ["f"]), node("GlobalAveragePool", ["f"], ["y"])],
        info("x", Type.FLOAT, ["batch", "c", "frames", "height", "width"]),
        info("y", Type.FLOAT, ["batch", 2, 1, 1, 1]),
        {"w": np.random.default_rng(7).standard_normal((2, 3, 1, 3, 3)).astype(np.float32)},
    )  # fmt: skip
    codes = write_session(
        folder, "codes",
        [node("Sub", ["x", "low"], ["above"]), node("Mod", ["x", "low"], ["rest"]),
         node("Mul", ["rest", "low"], ["far"]), node("Add", ["above", "far"], ["index"]),
         node("Gather", ["table", "index"], ["y"])],
        info("x", Type.INT64, ["batch", 2]), info("y", Type.FLOAT, ["batch", 2]),
        {"low": np.int64(100), "table": np.arange(201, dtype=np.float32) / 7},
    )  # fmt: skip
    (folder / "codes" / "samples").mkdir()
    right = codes.run(["y"], {"x": np.array(SAMPLE, np.int64)})[0].tolist()
    (folder / "codes" / "samples" / "one.json").write_text(
        json.dumps({"inputs": SAMPLE, "outputs": {"y": right}})
    )
    return ServedModels(module_serve(folder, "--trust"), modules, video, codes)


def test_scripts_of_pytorch_are_batched_or_not_by_runs_that_try_to_break_them(served: ServedModels) -> None:
    torch = pytest.importorskip("torch")
    assert not served.batching("rescale")["enabled"]
    assert "answers differently each time" in served.batching("remembers")["reason"]
    assert served.batching("spare")["enabled"], served.batching("spare")
    rows = [[0.1, 0.2, 0.3, 0.4], [255.0, 200.0, 100.0, 50.0]]
    for name in ("rescale", "spare"):
        right = [served.modules[name](torch.tensor([row])).tolist() for row in rows]
        asyncio.run(with_clients(served.server.port, CLIENTS, partial(ask, name, rows, right)))


def test_random_answers_are_told_apart_and_made_up_videos_stay_small(served: ServedModels) -> None:
    noise = served.batching("noise")
    assert not noise["enabled"]
    assert "answers differently each time" in noise["reason"]
    assert served.batching("video")["enabled"]
    rng = np.random.default_rng(8)
    rows = [rng.standard_normal((3, frames, 6, 7)).astype(np.float32).tolist() for frames in (2, 5)]
    right = [served.video.run(["y"], {"x": np.array([row], np.float32)})[0].tolist() for row in rows]
    asyncio.run(with_clients(served.server.port, CLIENTS, partial(ask, "video", rows, right)))


def test_a_golden_sample_serves_though_no_made_up_row_runs(served: ServedModels) -> None:
    """The model takes the codes 100, 200 and 300 alone: others are out of its table's range."""
    right = served.codes.run(["y"], {"x": np.array(SAMPLE, np.int64)})[0].tolist()
    answer = served.server.post("/predict/codes", json={"inputs": SAMPLE}).json()
    assert np.allclose(answer["outputs"]["y"], right)
    assert served.batching("codes")["enabled"]
