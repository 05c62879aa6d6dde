"""Any tensor that ONNX Runtime runs goes through the server, as JSON both ways."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import onnxruntime
import pytest
from inferpool.tensors import DTYPES
from onnx import TensorProto, helper

from tests import onnx_models
from tests.onnx_models import bf16, constant, identity, model, put, tensor_type, value, value_of
from tests.server import Server

node = helper.make_node
ROWS: Final = {
    "BOOL": [[True, False], [False, False]],
    "UINT8": [[0, 255], [1, 2]],
    "UINT16": [[0, 65535], [1, 2]],
    "UINT32": [[0, 2**32 - 1], [1, 2]],
    "UINT64": [[0, 2**64 - 1], [2**53 + 1, 2]],
    "INT8": [[-128, 127], [1, 2]],
    "INT16": [[-32768, 32767], [1, 2]],
    "INT32": [[-(2**31), 2**31 - 1], [1, 2]],
    "INT64": [[-(2**63), 2**63 - 1], [2**53 + 1, 2]],
    "FP16": [[0.5, -65504.0], [6e-8, 0.0]],
    "FP32": [[0.1, -3.4e38], [1e-45, 16777217.0]],
    "FP64": [[0.1, -1.7e308], [5e-324, 9007199254740993.0]],
    "BYTES": [["", "a\0b\0"], ["naïve 漢字 😀", '"\\\n']],
}
"""Two rows of every datatype that JSON carries, with the ends of its range."""

NAMES: Final = [f"x{number}" for number in range(48)]
ODD: Final = ["a.b", "serving_default/x:0", "größe", "入力😀", "two words"]


def answered(answer: httpx.Response) -> dict[str, Any]:
    """The outputs of an answer that is one."""
    assert answer.status_code == 200, answer.text
    outputs: dict[str, Any] = answer.json()["outputs"]
    return outputs


def predict(server: Server, name: str, inputs: Any, **fields: Any) -> dict[str, Any]:
    return answered(server.post(f"/predict/{name}", json={"inputs": inputs, **fields}))


def refused(answer: httpx.Response, code: str, status: int) -> str:
    """The detail of a problem."""
    problem = answer.json()
    assert (problem["code"], answer.status_code) == (code, status), answer.text
    detail: str = problem["detail"]
    return detail


def version_of(server: Server, name: str) -> dict[str, Any]:
    version: dict[str, Any] = server.get(f"/models/{name}/1").json()
    return version


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@cache
def iris() -> Any:
    """The rows of flowers and their classes; scikit-learn takes seconds to import, so it is imported late."""
    from sklearn.datasets import load_iris

    return load_iris()


def classifier(names: bool) -> Any:
    """Iris flowers by logistic regression, the scores a map from class to number."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    data = iris()
    classes = data.target_names[data.target] if names else data.target
    fitted = LogisticRegression(max_iter=1000).fit(data.data, classes)
    return to_onnx(fitted, data.data[:1].astype(np.float32), target_opset=onnx_models.OPSETS)


def optional_input() -> Any:
    """Gives back `x`, or else a default."""
    rows: onnx_models.Shape = ["rows", 2]
    there = helper.make_graph(
        [node("OptionalGetElement", ["x"], ["a"])], "there", [], [value("a", "FP32", rows)]
    )
    lacking = helper.make_graph(
        [node("Identity", ["default"], ["b"])], "lacking", [], [value("b", "FP32", rows)]
    )
    kind = helper.make_optional_type_proto(tensor_type("FP32", rows))
    return model(
        [
            node("OptionalHasElement", ["x"], ["has"]),
            node("If", ["has"], ["y"], then_branch=there, else_branch=lacking),
        ],
        [value_of("x", kind), value("default", "FP32", rows)],
        [value("y", "FP32", rows)],
    )


def build(repository: Path) -> None:
    """Every model of this file, each as its version 1."""
    for datatype in ROWS:
        put(identity(datatype, ["rows", 2]), repository, f"same-{datatype}")
    for number, name in enumerate(ODD):
        put(identity("FP32", ["rows"], name, f"{name}/out"), repository, f"odd-{number}")
    floats = value("x", "FP32", ["rows", 2])
    sums = [node("Add", ["x", "w"], ["y"])]
    weights = constant("w", "FP32", np.array([1, 2], np.float32))
    models = {
        "scalar": identity("FP32", []),
        "open": identity("FP32", None),
        "matrix": identity("INT64", ["rows", "columns"]),
        "pair": identity("FP32", [2, 3]),
        "bf16": identity("BF16", ["rows", 2]),
        "to-bf16": model(
            [node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)], [floats], [value("y", "BF16", ["rows", 2])]
        ),
        "optional": optional_input(),
        "default": model(
            sums, [floats, value("w", "FP32", [2])], [value("y", "FP32", ["rows", 2])], [weights]
        ),
        "nothing": model([], [], [value("w", "FP32", [2])], [weights]),
        "constant": model(
            [node("Identity", ["x"], ["y"])],
            [floats],
            [value("y", "FP32", ["rows", 2]), value("w", "FP32", [2])],
            [weights],
        ),
        "dozens": model(
            [node("Sum", NAMES, ["y"])],
            [value(name, "FP32", ["rows", 2]) for name in NAMES],
            [value("y", "FP32", ["rows", 2])],
        ),
        "three": model(
            [node("Identity", ["x"], [name]) for name in "abc"],
            [floats],
            [value(name, "FP32", ["rows", 2]) for name in "abc"],
        ),
        "sequence": model(
            [node("SplitToSequence", ["x"], ["parts"], keepdims=0)],
            [floats],
            [value_of("parts", helper.make_sequence_type_proto(tensor_type("FP32")))],
        ),
        "perhaps": model(
            [node("Identity", ["x"], ["y"])],
            *(
                [value_of(name, helper.make_optional_type_proto(tensor_type("FP32", ["n"])))]
                for name in ("x", "y")
            ),
        ),
        "takes-sequence": model(
            [node("SequenceLength", ["x"], ["y"])],
            [value_of("x", helper.make_sequence_type_proto(tensor_type("FP32")))],
            [value("y", "INT64", [])],
        ),
        "iris": classifier(names=True),
        "iris-numbers": classifier(names=False),
        "external": onnx_models.add_external("data/weights.bin"),
        "outside": onnx_models.add_external("../weights.bin"),
    }
    for name, built in models.items():
        put(built, repository, name)
    for folder in (repository / "external" / "1" / "data", repository / "outside"):
        folder.mkdir(exist_ok=True)
        (folder / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensors")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, cache_dir: Path) -> Iterator[Server]:
    environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "0"}
    running = Server(repository, (), environ)
    running.wait_loaded()
    yield running
    running.kill()


def runtime(repository: Path, name: str) -> onnxruntime.InferenceSession:
    """ONNX Runtime without anything around it."""
    return onnxruntime.InferenceSession(
        repository / name / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )


def test_only_unservable_models_have_failed(server: Server) -> None:
    failed = {
        model["name"]: model["versions"][0]["reason"]
        for model in server.get("/models").json()["models"]
        if model["versions"][0]["state"] != "ready"
    }
    assert failed.keys() == {"takes-sequence", "outside"}
    assert failed["takes-sequence"] == 'input "x" has type seq(tensor(float)), which cannot be served'
    assert "initializer: w. Error: External data path escapes model directory" in failed["outside"]
    assert not [line for line in server.log if line["level"] == "raw"]


@pytest.mark.parametrize("datatype", ROWS)
def test_every_datatype_travels_as_json(server: Server, repository: Path, datatype: str) -> None:
    rows = ROWS[datatype]
    outputs = predict(server, f"same-{datatype}", {"x": rows})
    got = np.array(outputs["y"], DTYPES[datatype])
    expected = runtime(repository, f"same-{datatype}").run(None, {"x": np.array(rows, DTYPES[datatype])})[0]
    assert got.tolist() == expected.tolist()
    assert got.shape == (2, 2)
    assert version_of(server, f"same-{datatype}")["inputs"][0]["datatype"] == datatype


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_zero_keeps_its_sign(server: Server, datatype: str) -> None:
    outputs = predict(server, f"same-{datatype}", {"x": [[-0.0, 0.0]]})
    assert np.signbit(outputs["y"]).tolist() == [[True, False]]


def test_bf16_travels_as_numbers(server: Server) -> None:
    """Also through /v2, in JSON and in binary form: what an answer has, a request may have."""
    outputs = predict(server, "to-bf16", {"x": [[1.5, -2.0], [0.1, 2.0**100]]})
    assert np.array(outputs["y"], np.float32).tolist() == [[1.5, -2.0], [0.10009765625, 2.0**100]]
    rows = outputs["y"]
    assert predict(server, "bf16", {"x": rows})["y"] == rows
    gap = server.post("/predict/bf16", json={"inputs": {"x": [[1.5, None]]}}).json()
    assert (gap["outputs"]["y"], gap["non_finite"]) == ([[1.5, None]], ["y"])
    tensor = {
        "name": "x",
        "datatype": "BF16",
        "shape": [2, 2],
        "data": [*rows[0], *rows[1]],
    }
    found = server.post("/v2/models/bf16/infer", json={"inputs": [tensor]}).json()["outputs"][0]
    assert {**tensor, "name": "y"} == found
    binary = {"name": "y", "parameters": {"binary_data": True}}
    raw = server.post("/v2/models/bf16/infer", json={"inputs": [tensor], "outputs": [binary]})
    head = int(raw.headers["inference-header-content-length"])
    bits = bf16(1.5, -2.0, 0.10009765625, 2.0**100)
    assert np.frombuffer(raw.content[head:], np.uint16).tolist() == bits.tolist()


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_null_travels_both_ways(server: Server, datatype: str) -> None:
    """The model gets NaN, so that an answer with gaps can be sent as a request."""
    rows = [[None, 1.5], [-2.0, None]]
    answer = server.post(f"/predict/same-{datatype}", json={"inputs": {"x": rows}}).json()
    assert (answer["outputs"]["y"], answer["non_finite"]) == (rows, ["y"])
    tensor = {"name": "x", "datatype": datatype, "shape": [2, 2], "data": [None, 1.5, -2.0, None]}
    (found,) = server.post(f"/v2/models/same-{datatype}/infer", json={"inputs": [tensor]}).json()["outputs"]
    assert (found["data"], found["parameters"]) == (tensor["data"], {"non_finite": True})
    nested = {**tensor, "data": rows}
    assert server.post(f"/v2/models/same-{datatype}/infer", json={"inputs": [nested]}).status_code == 200
    refused(server.post("/predict/same-INT64", json={"inputs": {"x": rows}}), "invalid_input", 422)


def test_bf16_travels_as_bits_in_arrays(server: Server) -> None:
    bits = bf16(1.5, -2.0, 0.0, float("inf")).reshape(2, 2)
    headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    answer = server.post("/predict/bf16", content=npy(bits), headers=headers)
    assert answer.status_code == 200
    back = np.load(io.BytesIO(answer.content))
    assert (back.dtype, back.tolist()) == (bits.dtype, bits.tolist())


@pytest.mark.parametrize("inputs", [{"x": 2.5}, 2.5])
def test_a_scalar_is_a_number(server: Server, inputs: Any) -> None:
    assert predict(server, "scalar", inputs)["y"] == 2.5
    assert version_of(server, "scalar")["inputs"][0]["shape"] == []
    assert refused(server.post("/predict/scalar", json={"inputs": [2.5]}), "invalid_input", 422)


@pytest.mark.parametrize("rows", [[], [[]], [[], []], [[1]], [[1, 2, 3], [4, 5, 6]]])
def test_dimensions_of_any_size_follow_the_request(server: Server, rows: list[list[int]]) -> None:
    headers = {"content-type": "application/x-npy"}
    array = np.array(rows, np.int64).reshape(len(rows), -1 if any(rows) else 0)
    answer = server.post("/predict/matrix", content=npy(array), headers=headers)
    assert answered(answer)["y"] == array.tolist()
    if rows:
        assert predict(server, "matrix", {"x": rows})["y"] == rows


def test_zero_rows_give_zero_rows(server: Server) -> None:
    array = np.empty((0, 2), np.float32)
    answer = server.post(
        "/predict/same-FP32", content=npy(array), headers={"content-type": "application/x-npy"}
    )
    assert answered(answer)["y"] == []


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        [[[1.0], [2.0]]],
        [],
        [[[]]],
        7.0,
    ],
)
def test_a_tensor_of_unknown_rank_may_have_any(server: Server, value: Any) -> None:
    assert version_of(server, "open")["inputs"][0]["shape"] is None
    assert predict(server, "open", {"x": value})["y"] == value


def test_rows_of_an_unknown_rank_are_not_batched(server: Server) -> None:
    """A proof for rows of one shape says nothing of tensors of another rank."""
    assert not version_of(server, "open")["batching"]["enabled"]


def test_a_fixed_first_dimension_is_not_rows(server: Server) -> None:
    pair = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    batching = version_of(server, "pair")["batching"]
    assert not batching["enabled"]
    assert "fixed at 2" in batching["reason"]
    assert predict(server, "pair", {"x": pair})["y"] == pair
    detail = refused(server.post("/predict/pair", json={"inputs": {"x": pair[:1]}}), "invalid_input", 422)
    assert "[1, 3]" in detail
    assert "[2, 3]" in detail


def test_an_optional_input_may_be_left_out_or_set(server: Server) -> None:
    default, x = [[7.0, 8.0]], [[1.0, 2.0]]
    assert [spec["optional"] for spec in version_of(server, "optional")["inputs"]] == [True, False]
    assert predict(server, "optional", {"default": default})["y"] == default
    assert predict(server, "optional", {"default": default, "x": x})["y"] == x
    assert predict(server, "optional", default)["y"] == default
    detail = refused(server.post("/predict/optional", json={"inputs": {"x": x}}), "invalid_input", 422)
    assert '"default" is missing' in detail


def test_a_default_may_be_left_or_set(server: Server) -> None:
    rows = [[10.0, 20.0], [30.0, 40.0]]
    assert predict(server, "default", {"x": rows})["y"] == [[11.0, 22.0], [31.0, 42.0]]
    assert predict(server, "default", {"x": rows, "w": [0.0, -20.0]})["y"] == [[10.0, 0.0], [30.0, 20.0]]
    assert predict(server, "default", rows)["y"] == [[11.0, 22.0], [31.0, 42.0]]
    answer = server.post("/predict/default", json={"inputs": {"x": rows, "w": [0.0]}})
    assert '"w"' in refused(answer, "invalid_input", 422)


@pytest.mark.parametrize(("number", "name"), list(enumerate(ODD)))
def test_names_hold_anything(server: Server, number: int, name: str) -> None:
    assert predict(server, f"odd-{number}", {name: [1.0, 2.0]}) == {f"{name}/out": [1.0, 2.0]}
    assert predict(server, f"odd-{number}", {name: [1.0]}, outputs=[f"{name}/out"]) == {f"{name}/out": [1.0]}


def test_a_model_without_inputs_takes_none(server: Server) -> None:
    assert predict(server, "nothing", {}) == {"w": [1.0, 2.0]}
    answer = server.post("/predict/nothing", json={"inputs": {"x": 1}})
    assert 'no input is called "x"; the model takes none' in refused(answer, "invalid_input", 422)


def test_a_model_may_have_dozens_of_inputs(server: Server) -> None:
    inputs = {name: [[number, 1.0]] for number, name in enumerate(NAMES)}
    assert predict(server, "dozens", inputs)["y"] == [[1128.0, 48.0]]
    del inputs["x17"]
    detail = refused(server.post("/predict/dozens", json={"inputs": inputs}), "invalid_input", 422)
    assert '"x17" is missing' in detail


def test_a_constant_output_keeps_its_shape(server: Server) -> None:
    assert predict(server, "constant", {"x": [[3.0, 4.0]]}) == {"y": [[3.0, 4.0]], "w": [1.0, 2.0]}
    assert 'output "w"' in version_of(server, "constant")["batching"]["reason"]


def test_the_outputs_asked_for_are_answered_in_that_order(server: Server) -> None:
    assert list(predict(server, "three", [[1.0, 2.0]])) == ["a", "b", "c"]
    assert list(predict(server, "three", [[1.0, 2.0]], outputs=["c", "a"])) == ["c", "a"]


def test_external_data_is_read_from_the_version(server: Server) -> None:
    assert predict(server, "external", {"x": [[0.0, 0.0, 0.0, 1.0]]})["y"] == [[0.0, 1.0, 2.0, 4.0]]


@pytest.mark.parametrize("name", ["iris", "iris-numbers"])
def test_maps_are_answered_as_objects(server: Server, repository: Path, name: str) -> None:
    flowers = iris().data[::30].astype(np.float32)
    outputs = predict(server, name, flowers.tolist())
    labels, scores = runtime(repository, name).run(None, {"X": flowers})
    assert outputs["output_label"] == labels.tolist()
    assert outputs["output_probability"] == [
        {str(label): pytest.approx(score, rel=1e-6) for label, score in row.items()} for row in scores
    ]
    assert [len(row) for row in outputs["output_probability"]] == [3] * len(flowers)


def test_a_model_with_a_map_for_each_row_is_batched(server: Server) -> None:
    version = version_of(server, "iris")
    assert version["outputs"][1] == {
        "name": "output_probability",
        "datatype": "JSON",
        "shape": None,
        "optional": False,
    }
    assert version["batching"]["enabled"]


def test_a_json_output_cannot_be_an_array_file(server: Server) -> None:
    body = {"inputs": [[1.0] * 4], "outputs": ["output_probability"]}
    answer = server.post("/predict/iris", json=body, headers={"accept": "application/x-npy"})
    assert "application/json" in refused(answer, "unsupported_media_type", 415)
    body["outputs"] = ["output_label"]
    answer = server.post("/predict/iris", json=body, headers={"accept": "application/x-npy"})
    assert np.load(io.BytesIO(answer.content)).shape == (1,)


def test_sequences_are_answered_as_lists(server: Server) -> None:
    assert predict(server, "sequence", [[1.0, 2.0], [0.1, -0.0]]) == {"parts": [[1.0, 2.0], [0.1, -0.0]]}


def test_an_optional_output_is_answered_or_null(server: Server) -> None:
    assert predict(server, "perhaps", {"x": [0.1, 2.0]}) == {"y": [0.1, 2.0]}
    assert predict(server, "perhaps", {}) == {"y": None}


def test_a_long_name_is_not_repeated(server: Server) -> None:
    name = "n" * 100_000
    for body in ({"inputs": {name: 1}}, {"inputs": {"x": [[1.0, 2.0]]}, "outputs": [name]}):
        answer = server.post("/predict/same-FP32", json=body)
        assert "is called" in refused(answer, "invalid_input", 422)
        assert len(answer.content) < 1000


def test_golden_samples_hold_maps(repository: Path, tmp_path: Path, cache_dir: Path) -> None:
    flower = iris().data[:1].astype(np.float32)
    _, scores = runtime(repository, "iris").run(None, {"X": flower})
    put(classifier(names=True), tmp_path, "iris")
    (tmp_path / "iris" / "samples").mkdir()
    sample = {"inputs": flower.tolist(), "outputs": {"output_probability": scores}}
    (tmp_path / "iris" / "samples" / "one.json").write_text(json.dumps(sample))
    running = Server(tmp_path, (), {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "0"})
    try:
        running.wait_loaded()
        assert version_of(running, "iris")["state"] == "ready"
    finally:
        running.kill()
