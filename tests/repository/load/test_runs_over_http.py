"""Models whose graphs are not read answer each request as they answer it alone; made-up inputs stay small."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as Type
from onnx import helper

from tests.clients import Client, with_clients
from tests.conftest import Serve
from tests.onnx_models import write_session

node, info = helper.make_node, helper.make_tensor_value_info
CLIENTS, ROUNDS = 8, 15
TAKES_FOUR = '[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 4]\n'


async def ask(name: str, rows: list[Any], right: list[Any], client: Client, number: int) -> None:
    """Send the rows in turn, and compare the answers with those that are right."""
    for turn in range(ROUNDS):
        which = (number + turn) % len(rows)
        reply = await client.post(f"/predict/{name}", json.dumps({"inputs": [rows[which]]}).encode())
        assert reply.status == 200, reply.body
        (answer,) = json.loads(reply.body)["outputs"].values()
        assert np.allclose(answer, right[which], rtol=1e-4, atol=1e-6), (name, which)


def test_scripts_of_pytorch_are_batched_or_not_by_runs_that_try_to_break_them(
    tmp_path: Path, serve: Serve
) -> None:
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

    modules: dict[str, Any] = {"rescale": Rescale(), "spare": Spare(), "remembers": Remembers()}
    for name, module in modules.items():
        (tmp_path / "models" / name / "1").mkdir(parents=True)
        with pytest.warns(DeprecationWarning, match="deprecated"):
            torch.jit.script(module).save(str(tmp_path / "models" / name / "1" / "model.pt"))
        (tmp_path / "models" / name / "model.toml").write_text(TAKES_FOUR)
    server = serve(tmp_path / "models", "--trust")

    def batching(name: str) -> Any:
        return server.get(f"/models/{name}/1").json()["batching"]

    assert not batching("rescale")["enabled"]
    assert "answers differently each time" in batching("remembers")["reason"]
    assert batching("spare")["enabled"], batching("spare")
    rows = [[0.1, 0.2, 0.3, 0.4], [255.0, 200.0, 100.0, 50.0]]
    for name in ("rescale", "spare"):
        right = [modules[name](torch.tensor([row])).tolist() for row in rows]
        asyncio.run(with_clients(server.port, CLIENTS, partial(ask, name, rows, right)))


def test_random_answers_are_told_apart_and_made_up_videos_stay_small(tmp_path: Path, serve: Serve) -> None:
    rng = np.random.default_rng(7)
    folder = tmp_path / "models"
    write_session(
        folder, "noise", [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])],
        info("x", Type.FLOAT, ["batch", 4]), info("y", Type.FLOAT, ["batch", 4]), {},
    )  # fmt: skip
    video = write_session(
        folder, "video", [node("Conv", ["x", "w"], ["f"]), node("GlobalAveragePool", ["f"], ["y"])],
        info("x", Type.FLOAT, ["batch", "c", "frames", "height", "width"]),
        info("y", Type.FLOAT, ["batch", 2, 1, 1, 1]),
        {"w": rng.standard_normal((2, 3, 1, 3, 3)).astype(np.float32)},
    )  # fmt: skip
    server = serve(folder)
    noise = server.get("/models/noise/1").json()["batching"]
    assert not noise["enabled"]
    assert "answers differently each time" in noise["reason"]
    assert server.get("/models/video/1").json()["batching"]["enabled"]
    rows = [rng.standard_normal((3, frames, 6, 7)).astype(np.float32).tolist() for frames in (2, 5)]
    right = [video.run(["y"], {"x": np.array([row], np.float32)})[0].tolist() for row in rows]
    asyncio.run(with_clients(server.port, CLIENTS, partial(ask, "video", rows, right)))


def test_a_golden_sample_serves_though_no_made_up_row_runs(tmp_path: Path, serve: Serve) -> None:
    """The model takes the codes 100, 200 and 300 alone: others are out of its table's range."""
    folder = tmp_path / "models"
    session = write_session(
        folder, "codes",
        [node("Sub", ["x", "low"], ["above"]), node("Mod", ["x", "low"], ["rest"]),
         node("Mul", ["rest", "low"], ["far"]), node("Add", ["above", "far"], ["index"]),
         node("Gather", ["table", "index"], ["y"])],
        info("x", Type.INT64, ["batch", 2]), info("y", Type.FLOAT, ["batch", 2]),
        {"low": np.int64(100), "table": np.arange(201, dtype=np.float32) / 7},
    )  # fmt: skip
    sample = [[100, 300]]
    right = session.run(["y"], {"x": np.array(sample, np.int64)})[0].tolist()
    (folder / "codes" / "samples").mkdir()
    (folder / "codes" / "samples" / "one.json").write_text(
        json.dumps({"inputs": sample, "outputs": {"y": right}})
    )
    server = serve(folder)
    assert np.allclose(server.post("/predict/codes", json={"inputs": sample}).json()["outputs"]["y"], right)
    assert server.get("/models/codes/1").json()["batching"]["enabled"]
