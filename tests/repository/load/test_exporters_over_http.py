"""Models as exporters write them are served and batched, whatever their files say of shapes and types."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as Type
from onnx import helper, numpy_helper

from tests.clients import Client, with_clients
from tests.conftest import Serve
from tests.server import Server

node, info = helper.make_node, helper.make_tensor_value_info
CLIENTS, ROUNDS = 8, 10
TEXTS = ["a good film", "", "bad bad bad film and so very very long that others are filled up", "good"]


class Exported(NamedTuple):
    """A model, and rows to send; `key` is the name of its input."""

    proto: onnx.ModelProto
    key: str
    rows: list[np.ndarray]


def model(
    nodes: list[onnx.NodeProto],
    taken: onnx.ValueInfoProto,
    given: list[onnx.ValueInfoProto],
    constants: dict[str, Any],
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", [taken], given, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def any_size(name: str) -> Exported:
    """A network for pictures of any size, whose height and width have one name."""
    proto = model(
        [
            node("GlobalAveragePool", ["x"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("MatMul", ["f", "w"], ["y"]),
        ],
        info("x", Type.FLOAT, [name, 3, name, name]),
        [info("y", Type.FLOAT, [name, 2])],
        {"w": normal(3, 2)},
    )
    return Exported(proto, "x", [normal(3, 48, 192), normal(3, 32, 32)])


def declared() -> Exported:
    """A classifier whose labels are declared as those of one row."""
    proto = model(
        [node("MatMul", ["x", "w"], ["s"]), node("ArgMax", ["s"], ["label"], axis=1, keepdims=0)],
        info("x", Type.FLOAT, ["batch", 4]),
        [info("label", Type.INT64, [1]), info("s", Type.FLOAT, ["batch", 3])],
        {"w": normal(4, 3)},
    )
    return Exported(proto, "x", list(normal(4, 4)))


def waveform() -> Exported:
    """A network for sound of any length from 25 ms on."""
    proto = model(
        [
            node("Unsqueeze", ["x", "one"], ["c"]),
            node("Conv", ["c", "k"], ["f"], strides=[160]),
            node("GlobalMaxPool", ["f"], ["p"]),
            node("Flatten", ["p"], ["y"]),
        ],
        info("x", Type.FLOAT, ["n", "samples"]),
        [info("y", Type.FLOAT, ["n", 16])],
        {"one": np.array([1]), "k": normal(16, 1, 400)},
    )
    return Exported(proto, "x", [normal(16_000), normal(2, 16_000)[1], normal(8000)])


def forest(labels: list[Any]) -> Exported:
    """A forest of scikit-learn, exported with its mapping of probabilities."""
    ensemble, skl2onnx = pytest.importorskip("sklearn.ensemble"), pytest.importorskip("skl2onnx")
    rows = normal(60, 4)
    classes = np.array(labels)[(rows[:, 0] > 0) * 1 + (rows[:, 1] > 1) * 1]
    fitted = ensemble.RandomForestClassifier(5, random_state=1).fit(rows, classes)
    proto = skl2onnx.to_onnx(fitted, rows[:1], target_opset=17)
    return Exported(proto, "X", list(rows[:6]))


def tf_idf() -> Exported:
    """TF-IDF with word pairs and a classifier, as scikit-learn has them."""
    pytest.importorskip("sklearn")
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression())
    pipeline.fit(["good film", "bad film", "very good thing", "so bad", "fine day"], [1, 0, 1, 0, 1])
    kind = skl2onnx.common.data_types.StringTensorType([None, 1])
    proto = skl2onnx.convert_sklearn(pipeline, initial_types=[("text", kind)])
    return Exported(proto, "text", [np.array([text], object) for text in TEXTS])


MODELS: dict[str, Callable[[], Exported]] = {
    "any-size": partial(any_size, "?"),
    "one-name": partial(any_size, "size"),
    "declared": declared,
    "waveform": waveform,
    "forest": partial(forest, [3, 5, 7]),
    "words": partial(forest, ["cat", "dog", "hen"]),
    "tf-idf": tf_idf,
}


@pytest.fixture(scope="session")
def locales(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the locale that StringNormalizer needs, for LOCPATH."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("there is no localedef to make a locale with")
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "UTF-8", str(folder / "en_US.UTF-8")],
        capture_output=True,
        check=False,
    )
    if made.returncode > 1:  # 1 is a warning
        pytest.skip("the sources of the locale en_US.UTF-8 are not installed")
    return str(folder)


def expected(file: Path, exported: Exported, environ: dict[str, str]) -> list[dict[str, Any]]:
    """The answer to each row alone; by another process, because a locale is found by its environment."""
    script = (
        "import json, sys, numpy as np, onnxruntime as ort\n"
        "file, key, kind = sys.argv[1:]\n"
        "session = ort.InferenceSession(file, providers=['CPUExecutionProvider'])\n"
        "names = [each.name for each in session.get_outputs()]\n"
        "plain = lambda value: value.tolist() if hasattr(value, 'tolist') else value\n"
        "for line in sys.stdin:\n"
        "    row = np.array([json.loads(line)], kind)\n"
        "    print(json.dumps(dict(zip(names, map(plain, session.run(names, {key: row}))))))\n"
    )
    rows = "".join(json.dumps(row.tolist()) + "\n" for row in exported.rows)
    kind = "object" if exported.rows[0].dtype.kind == "O" else "float32"
    done = subprocess.run(
        [sys.executable, "-c", script, str(file), exported.key, kind],
        input=rows, capture_output=True, text=True, check=True, env={**os.environ, **environ},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


class ServedModels(NamedTuple):
    """A server of all MODELS, what they are, and their repository."""

    server: Server
    exported: dict[str, Exported]
    repository: Path


@pytest.fixture(scope="module")
def served(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory, locales: str) -> ServedModels:
    repository = tmp_path_factory.mktemp("exported")
    exported = {name: make() for name, make in MODELS.items()}
    for name, each in exported.items():
        save(repository, name, each)
    size = exported["one-name"]
    session = onnxruntime.InferenceSession(size.proto.SerializeToString())
    row = size.rows[0][None]
    sample = {"inputs": row.tolist(), "outputs": {"y": session.run(["y"], {"x": row})[0].tolist()}}
    samples = save(repository, "sampled", size).parent / "samples"
    samples.mkdir()
    (samples / "one.json").write_text(json.dumps(sample))
    return ServedModels(module_serve(repository, LOCPATH=locales), exported, repository)


def save(repository: Path, name: str, exported: Exported) -> Path:
    """Write version 1 of a model; returns its folder."""
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    onnx.save(exported.proto, str(folder / "model.onnx"))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_client_gets_the_answer_of_its_row_alone_from_batches(
    served: ServedModels, locales: str, name: str
) -> None:
    server, exported = served.server, served.exported[name]
    version = server.get(f"/models/{name}/1").json()
    assert version["state"] == "ready", version["reason"]
    assert version["batching"]["enabled"], version["batching"]["reason"]
    right = expected(served.repository / name / "1" / "model.onnx", exported, {"LOCPATH": locales})
    bodies = [json.dumps({"inputs": [row.tolist()]}).encode() for row in exported.rows]
    asyncio.run(with_clients(server.port, CLIENTS, partial(ask, name, bodies, right)))
    several = [index for index, row in enumerate(exported.rows) if row.shape == exported.rows[0].shape]
    reply = server.post(
        f"/predict/{name}", json={"inputs": [exported.rows[index].tolist() for index in several]}
    )
    assert_alike(reply.json()["outputs"], joined([right[index] for index in several]))
    check_v2(server, name, exported, right)


async def ask(
    name: str, bodies: list[bytes], right: list[dict[str, Any]], client: Client, number: int
) -> None:
    for turn in range(ROUNDS):
        which = (number + turn) % len(right)
        reply = await client.post(f"/predict/{name}", bodies[which])
        assert reply.status == 200, reply.body
        assert_alike(json.loads(reply.body)["outputs"], right[which])


def joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row for answer in answers for row in answer[name]] for name in answers[0]}


def assert_alike(got: Any, want: Any) -> None:
    """Compare two answers; numbers may differ by rounding, and keys are texts in JSON."""
    if isinstance(want, dict):
        assert got.keys() == {str(key) for key in want}
        for key, value in want.items():
            assert_alike(got[str(key)], value)
    elif isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_alike(one, other)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    else:
        assert got == want


def check_v2(server: Server, name: str, exported: Exported, right: list[dict[str, Any]]) -> None:
    """Send the first row by the other API, and look at the metadata."""
    row = exported.rows[0]
    datatype = "BYTES" if row.dtype.kind == "O" else "FP32"
    tensor: dict[str, Any] = {"name": exported.key, "shape": [1, *row.shape], "datatype": datatype}
    tensor["data"] = row.reshape(-1).tolist()
    answer = server.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]}).json()
    metadata = {each["name"]: each for each in server.get(f"/v2/models/{name}").json()["outputs"]}
    for output in answer["outputs"]:
        assert metadata[output["name"]]["shape"][0] == -1
        want = right[0][output["name"]]
        if output["datatype"] == "BYTES" and isinstance(want[0], dict):
            assert output["shape"] == [1]
            assert_alike(json.loads(output["data"][0]), want[0])
        else:
            assert_alike(output["data"], np.array(want).reshape(-1).tolist())


def test_labels_that_are_declared_for_one_row_are_described_as_they_are(served: ServedModels) -> None:
    view = served.server.get("/models/declared/1").json()
    outputs = {each["name"]: each["shape"] for each in view["outputs"]}
    assert outputs == {"label": [-1], "s": [-1, 3]}


def test_a_sample_with_unequal_sizes_serves(served: ServedModels) -> None:
    row = served.exported["one-name"].rows[0][None]
    assert served.server.post("/predict/sampled", json={"inputs": row.tolist()}).status_code == 200
