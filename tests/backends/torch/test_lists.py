"""Lists and dicts of tensors, whose number may depend on the input, are answered whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from inferpool.backends.base import LoadedModel, LoadOptions, TensorHint
from inferpool.backends.registry import find_backend
from inferpool.backends.torch.model import OtherOutputs
from inferpool.backends.torch.signature import varying_structures
from onnx import helper
from torch import Tensor, nn

from tests.backends.torch.networks import configure, described, save_scripted
from tests.clients import Client, with_clients
from tests.conftest import WITHOUT_SPARE, in_both_engines
from tests.onnx_models import ELEMENTS, model, put, value, value_of
from tests.record import needs_to_run
from tests.server import Server


class Rows(nn.Module):
    """A dict for each row."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"sum": row.sum(), "top": row.max()} for row in x.unbind(0)]


class Large(nn.Module):
    """The rows whose sum is large, beside a usual output."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []
        for row in x.unbind(0):
            if bool(row.sum() > 100):
                found.append(row)  # noqa: PERF401 - appending is what is tested
        return x + 1, found


class Mixed(nn.Module):
    """A list as long as the input, beside one that always has two tensors."""

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        return {"rows": x.unbind(0), "pair": [x, x + 1]}


class Layers(nn.Module):
    """A list that is filled outside of loops: the loop over layers is unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for layer in self.layers:
            found.append(layer(x))  # noqa: PERF401 - appending is what is tested
        return found


class Keys(nn.Module):
    """A dict with another key if the sum is large."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {"y": x}
        if bool(x.sum() > 1000):
            found["more"] = x
        return found


class Halves(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [row.to(torch.bfloat16) for row in x.unbind(0)]


MODULES: Final[dict[str, Callable[[], nn.Module]]] = {
    "rows": Rows, "large": Large, "mixed": Mixed, "layers": Layers, "keys": Keys, "halves": Halves,
}  # fmt: skip
FOUR: Final = (TensorHint("x", "FP32", (-1, 4)),)


def numbers(rows: int, step: float = 10.0) -> np.ndarray:
    return np.arange(4 * rows, dtype=np.float32).reshape(rows, 4) * np.float32(step)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], LoadedModel]:
    def make(name: str) -> LoadedModel:
        file = save_scripted(tmp_path / f"{name}.pt", MODULES[name]().eval())
        return find_backend("torch").load(file, LoadOptions(inputs=FOUR, trusted=True))

    return make


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("rows", {"output_0": "JSON"}),
        ("large", {"output_0": "FP32", "output_1": "JSON"}),
        ("mixed", {"rows": "JSON", "pair_0": "FP32", "pair_1": "FP32"}),
        ("layers", {"output_0": "FP32", "output_1": "FP32"}),
        ("keys", {"y": "FP32"}),
    ],
)
def test_only_structures_that_depend_on_the_input_are_whole(
    load: Callable[[str], LoadedModel], name: str, outputs: dict[str, str]
) -> None:
    signature = load(name).signature
    assert {spec.name: spec.datatype for spec in signature.outputs} == outputs
    assert all((spec.shape is None) == (spec.datatype == "JSON") for spec in signature.outputs)


def test_an_output_that_appears_later_is_no_answer(load: Callable[[str], LoadedModel]) -> None:
    """A part of the answer would be lost in silence."""
    found = load("keys")
    assert found.run({"x": numbers(1)})["y"].tolist() == numbers(1).tolist()
    with pytest.raises(OtherOutputs, match="returned 2 outputs, and 1 at load"):
        found.run({"x": numbers(8)})
    assert found.rejection(OtherOutputs("it returned 2 outputs")) is None


def test_which_structures_vary() -> None:
    one = [("a", 0, "x"), ("a", 0, "y"), ("b",)]
    assert varying_structures(one, one) == set()
    assert varying_structures(one, [*one, ("a", 1, "x")]) == {("a",)}
    assert varying_structures(one, [("a", 0, "x"), ("b",)]) == {("a", 0)}
    assert varying_structures(one, [("a", 0, "x"), ("a", 0, "y")]) == {()}
    assert varying_structures([()], [(0,), (1,)]) == {()}
    assert varying_structures([("a",)], [("a", 0)]) == {("a",)}


@pytest.fixture(scope="module")
def server(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory, engine_variables: Mapping[str, str]
) -> Iterator[Server]:
    needs_to_run("torch")
    repository = tmp_path_factory.mktemp("lists")
    for name in ("rows", "large", "halves"):
        file = save_scripted(repository / name / "1" / "model.pt", MODULES[name]().eval())
        configure(file, described(x=("FP32", [-1, 4])))
    tensors = helper.make_sequence_type_proto(helper.make_tensor_type_proto(ELEMENTS["FP32"], None))
    put(
        model(
            [helper.make_node("SplitToSequence", ["x"], ["parts"], axis=0, keepdims=0)],
            [value("x", "FP32", ["n", 4])],
            [value_of("parts", tensors)],
        ),
        repository,
        "sequence",
    )
    variables = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200", **WITHOUT_SPARE}
    server = Server(repository, ("--trust",), {**variables, **engine_variables})
    server.wait_loaded()
    yield server
    server.kill()


def expected(name: str, x: np.ndarray) -> dict[str, Any]:
    """The whole answer, alone."""
    if name == "rows":
        return {"output_0": [{"sum": float(row.sum()), "top": float(row.max())} for row in x]}
    if name == "large":
        return {"output_0": (x + 1).tolist(), "output_1": [row.tolist() for row in x if row.sum() > 100]}
    if name == "halves":
        return {"output_0": torch.tensor(x).to(torch.bfloat16).float().tolist()}
    return {"parts": x.tolist()}


@in_both_engines
@pytest.mark.parametrize("name", ["rows", "large", "halves", "sequence"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_every_tensor_of_a_list_is_answered(server: Server, name: str, rows: int) -> None:
    x = numbers(rows)
    answer = server.post(f"/predict/{name}", json={"inputs": x.tolist()})
    assert answer.status_code == 200, answer.text
    want = expected(name, x)
    assert answer.json()["outputs"] == want
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "data": x.ravel().tolist()}
    found = server.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]}).json()["outputs"]
    texts = {each["name"]: each["data"] for each in found if each["datatype"] == "BYTES"}
    lists = {key: [json.loads(text) for text in data] for key, data in texts.items()}
    assert lists == {key: items for key, items in want.items() if key in lists}
    assert lists


@in_both_engines
@pytest.mark.parametrize("name", ["rows", "large", "halves", "sequence"])
def test_lists_are_right_in_company(server: Server, name: str) -> None:
    async def work(client: Client, number: int) -> None:
        for turn in range(10):
            x = numbers(1 + (number + turn) % 4, step=1 + number)
            reply = await client.post(f"/predict/{name}", json.dumps({"inputs": x.tolist()}).encode())
            assert reply.status == 200, reply.body
            assert json.loads(reply.body)["outputs"] == expected(name, x)

    asyncio.run(with_clients(server.port, 8, work))
