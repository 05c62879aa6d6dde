"""The Open Inference Protocol over plain HTTP: the forms of its bodies, and its errors."""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from inferpool.http.problems import STATUSES
from onnx import TensorProto, helper

from tests.chaos import inferpool_chaos as chaos
from tests.conftest import ROOT, MakeChaos, Serve
from tests.onnx_models import write_identity, write_model
from tests.server import Server

INFER = "/v2/models/diabetes/infer"
ROWS = np.random.default_rng(3).uniform(20, 80, (2, 10)).astype(np.float32)


def tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "features", "datatype": "FP32", "shape": [2, 10], **fields}


def binary_body(rows: np.ndarray = ROWS, **fields: Any) -> tuple[bytes, dict[str, str]]:
    entry = tensor(shape=list(rows.shape), parameters={"binary_data_size": rows.nbytes})
    header = json.dumps({"inputs": [entry], **fields}).encode()
    return header + rows.tobytes(), {"inference-header-content-length": str(len(header))}


def expected() -> np.ndarray:
    session = onnxruntime.InferenceSession(ROOT / "models/diabetes/1/model.onnx")
    (answer,) = session.run(None, {"features": ROWS})
    return answer


def code_of(answer: httpx.Response) -> str:
    """Check that the response is an error of this protocol, and return its code."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()
    assert error.keys() == {"error", "code"}
    assert error["error"]
    assert answer.status_code == STATUSES[error["code"]]
    return error["code"]


def progression(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in answer.headers
    (output,) = answer.json()["outputs"]
    assert (output["name"], output["datatype"]) == ("progression", "FP32")
    return np.array(output["data"], np.float32).reshape(output["shape"]).tolist()


@pytest.mark.parametrize("data", [ROWS.tolist(), ROWS.reshape(-1).tolist()])
@pytest.mark.parametrize("path", [INFER, "/v2/models/diabetes/versions/1/infer"])
def test_json_data_may_be_flat_or_nested(bundled: Server, path: str, data: list[Any]) -> None:
    answer = bundled.post(path, json={"id": "mine", "inputs": [tensor(data=data)]})
    assert progression(answer) == expected().tolist()
    assert answer.json()["id"] == "mine"
    assert (answer.json()["model_name"], answer.json()["model_version"]) == ("diabetes", "1")


def test_an_id_is_returned_only_if_the_client_sends_one(bundled: Server) -> None:
    answer = bundled.post(INFER, json={"inputs": [tensor(data=ROWS.tolist())]})
    assert "id" not in answer.json()
    assert answer.headers["x-request-id"]
    assert "compute;dur=" in answer.headers["server-timing"]


@pytest.mark.parametrize("pad", range(9))
def test_a_binary_tensor_is_read_at_any_alignment(bundled: Server, pad: int) -> None:
    body, headers = binary_body(id="x" * pad)
    assert progression(bundled.post(INFER, content=body, headers=headers)) == expected().tolist()


def test_a_large_binary_tensor_in_many_chunks_is_joined(bundled: Server) -> None:
    rows = np.random.default_rng(5).random((20_000, 10), np.float32)
    body, headers = binary_body(rows, parameters={"binary_data_output": True})

    def chunks() -> Any:
        yield from (body[start : start + 7001] for start in range(0, len(body), 7001))

    session = onnxruntime.InferenceSession(ROOT / "models/diabetes/1/model.onnx")
    (alone,) = session.run(None, {"features": rows})
    for content in (body, chunks()):
        answer = bundled.post(INFER, content=content, headers=headers)
        assert answer.status_code == 200, answer.text
        length = int(answer.headers["inference-header-content-length"])
        assert answer.headers["content-type"] == "application/octet-stream"
        found = np.frombuffer(answer.content[length:], np.float32).reshape(alone.shape)
        np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_a_raw_body_is_the_only_tensor(bundled: Server) -> None:
    headers = {"inference-header-content-length": "0", "content-type": "application/octet-stream"}
    answer = bundled.post(INFER, content=ROWS.tobytes(), headers=headers)
    length = int(answer.headers["inference-header-content-length"])
    assert answer.content[length:] == expected().tobytes()


def test_the_header_length_of_a_compressed_body_is_that_of_the_decompressed_one(bundled: Server) -> None:
    body, headers = binary_body()
    packed = {**headers, "content-encoding": "gzip"}
    answer = bundled.post(INFER, content=gzip.compress(body), headers=packed)
    assert progression(answer) == expected().tolist()


def test_each_output_is_selected_with_its_own_form(bundled: Server) -> None:
    body = {"inputs": [tensor(data=ROWS.tolist())], "outputs": [{"name": "progression"}]}
    assert progression(bundled.post(INFER, json=body)) == expected().tolist()
    body["outputs"] = [{"name": "progression", "parameters": {"binary_data": True}}]
    answer = bundled.post(INFER, json=body)
    length = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 8}
    assert answer.content[length:] == expected().tobytes()


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", INFER, b"not json", "malformed_body"),
        ("POST", INFER, b"", "malformed_body"),
        ("POST", INFER, {"inputs": [tensor(parameters={"binary_data_size": 80})]}, "malformed_body"),
        ("POST", INFER, {}, "invalid_input"),
        ("POST", INFER, {"inputs": []}, "invalid_input"),
        ("POST", INFER, {"inputs": [tensor(data=[1])]}, "invalid_input"),
        ("POST", INFER, {"inputs": [tensor(datatype="FP64", data=[1] * 20)]}, "invalid_input"),
        (
            "POST",
            INFER,
            {"inputs": [tensor(data=[[1] * 10] * 2)], "outputs": [{"name": "no"}]},
            "invalid_input",
        ),
        ("POST", "/v2/models/nobody/infer", {"inputs": []}, "model_not_found"),
        ("POST", "/v2/models/diabetes/versions/9/infer", {"inputs": []}, "version_not_found"),
        ("GET", INFER, b"", "method_not_allowed"),
        ("DELETE", INFER, b"", "method_not_allowed"),
        ("PUT", "/v2/models/diabetes", b"", "method_not_allowed"),
        ("GET", "/v2/nowhere", b"", "not_found"),
        ("GET", "/v2/models/nobody", b"", "model_not_found"),
        ("GET", "/v2/models/nobody/ready", b"", "model_not_found"),
        ("GET", "/v2/models/diabetes/versions/9", b"", "version_not_found"),
        ("GET", "/v2/models/diabetes/versions/9/ready", b"", "version_not_found"),
        ("POST", "/v2/repository/index", b"[", "malformed_body"),
        ("POST", "/v2/repository/index", b" " * 100_000, "body_too_large"),
        ("POST", "/v2/repository/index", {"ready": 1}, "invalid_input"),
        ("POST", "/v2/repository/models/digits/load", {}, "forbidden"),
        ("POST", "/v2/repository/models/digits/unload", b"", "forbidden"),
    ],
)
def test_errors_are_in_the_protocols_form(
    bundled: Server, method: str, path: str, body: object, code: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.request(method, bundled.url + path, content=content)
    assert code_of(answer) == code
    if code == "method_not_allowed":
        assert answer.headers["allow"] in ("GET, HEAD", "POST")


@pytest.mark.parametrize("path", ["/v2/repository/index", "/explain/digits", "/v2/models/digits/load", "/no"])
def test_a_body_that_is_announced_too_large_is_refused_at_once(bundled: Server, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", bundled.port)) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).split(b" ")[1] == b"413"


def test_a_compressed_query_is_refused_with_the_reason(bundled: Server) -> None:
    body, headers = gzip.compress(b"{}"), {"content-encoding": "gzip"}
    answer = bundled.post("/v2/repository/index", content=body, headers=headers)
    assert code_of(answer) == "unsupported_media_type"
    assert 'no Content-Encoding "gzip"' in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "9" * 30, "100000"])
def test_a_wrong_header_length_is_refused(bundled: Server, length: str) -> None:
    body, _ = binary_body()
    answer = bundled.post(INFER, content=body, headers={"inference-header-content-length": length})
    assert code_of(answer) == "malformed_body"


def test_an_unsupported_media_type_is_refused(bundled: Server) -> None:
    answer = bundled.post(INFER, content=b"x", headers={"content-type": "application/x-npy"})
    assert code_of(answer) == "unsupported_media_type"


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    """A server of models of several kinds, one of them broken."""
    repository = module_make_chaos("m", run_ms=300)
    module_make_chaos("batched", config="[batching]\nmax_delay_ms = 2.5\n")
    module_make_chaos("alone", mix=True)
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows"])
    listed = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    nodes = [helper.make_node("SequenceConstruct", ["x", "x"], ["parts"])]
    write_model(repository, "lists", helper.make_graph(nodes, "lists", [rows], [listed]))
    return module_serve(repository)


def test_a_timeout_counts_microseconds(server: Server) -> None:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    late = {**body, "parameters": {"timeout": 20_000}}
    assert code_of(server.post("/v2/models/m/infer", json=late)) == "deadline_exceeded"
    assert (
        code_of(server.post("/v2/models/m/infer", json=body, headers={"x-timeout-ms": "20"}))
        == "deadline_exceeded"
    )
    for timeout in (20_000_000, 0):
        answer = server.post("/v2/models/m/infer", json={**body, "parameters": {"timeout": timeout}})
        assert answer.json()["outputs"][0]["data"] == chaos.expected(np.array([[1, 2, 3, 4]])).tolist()


def test_a_priority_is_a_whole_number(bundled: Server) -> None:
    body = {"inputs": [tensor(data=ROWS.tolist())]}
    for priority in (0, 1, 2**40):
        answer = bundled.post(INFER, json={**body, "parameters": {"priority": priority}})
        assert answer.status_code == 200
    wrong = bundled.post(INFER, json={**body, "parameters": {"priority": -1}})
    assert code_of(wrong) == "invalid_input"


def test_a_model_that_raises_or_is_not_ready_has_its_code(server: Server) -> None:
    data = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [chaos.RAISE, 0, 0, 0]}
    failed = server.post("/v2/models/m/infer", json={"inputs": [data]})
    assert code_of(failed) == "model_failed"
    assert "marked" not in failed.text, "the response hides the cause"
    for path in ("", "/ready", "/config"):
        unready = server.get(f"/v2/models/broken{path}")
        assert code_of(unready) == "not_ready"
        assert int(unready.headers["retry-after"]) >= 1
    index = {entry["name"]: entry for entry in server.post("/v2/repository/index").json()}
    assert index["m"]["state"] == "READY"
    assert index["broken"]["state"] == "UNAVAILABLE"
    assert index["broken"]["reason"]
    ready = server.post("/v2/repository/index", json={"ready": True}).json()
    assert [entry["name"] for entry in ready] == ["alone", "batched", "lists", "m"]


def test_the_configuration_says_how_the_model_batches(server: Server) -> None:
    batched = server.get("/v2/models/batched/config").json()
    assert batched["max_batch_size"] > 1
    assert batched["dynamic_batching"] == {
        "preferred_batch_size": [],
        "max_queue_delay_microseconds": 2500,
    }
    assert batched["input"][0]["dims"] == [4]
    assert batched["instance_group"][0]["kind"] == "KIND_CPU"
    assert batched["version_policy"] == {"specific": {"versions": [1]}}
    alone = server.get("/v2/models/alone/config").json()
    assert alone["max_batch_size"] == 0
    assert "dynamic_batching" not in alone
    assert alone["input"][0]["dims"] == [-1, 4]
    assert server.get("/v2/models").json() == {"models": ["alone", "batched", "broken", "lists", "m"]}


def test_the_admin_routes_are_forbidden(bundled: Server) -> None:
    for method, path in (
        ("POST", "/models/digits/load"),
        ("POST", "/models/digits/unload"),
        ("PUT", "/models/digits/labels/stable"),
    ):
        answer = httpx.request(method, bundled.url + path)
        assert answer.status_code == 403
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "forbidden"


def test_an_output_that_is_not_a_tensor_is_returned_as_json_text(server: Server) -> None:
    metadata = server.get("/v2/models/lists").json()
    assert metadata["outputs"] == [{"name": "parts", "datatype": "BYTES", "shape": [-1]}]
    assert server.get("/v2/models/lists/config").json()["output"][0]["data_type"] == "TYPE_STRING"
    given = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2.5]}
    (output,) = server.post("/v2/models/lists/infer", json={"inputs": [given]}).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2])
    assert [json.loads(text) for text in output["data"]] == [[1.0, 2.5]] * 2


@pytest.fixture(scope="module")
def identities(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of models that return their inputs."""
    repository = tmp_path_factory.mktemp("models")
    write_identity(repository, "words", ["BYTES"])
    write_identity(repository, "many", ["FP32", "INT8", "BOOL", "BYTES", "FP64"])
    write_identity(repository, "scalar", ["UINT64"], ())
    write_identity(repository, "a b+c", ["FP16"])
    write_identity(repository, "brain", ["BF16"])
    return module_serve(repository)


def test_the_document_has_an_example_that_runs_for_every_model(identities: Server) -> None:
    server = identities
    paths = server.get("/openapi.json").json()["paths"]
    ran = []
    for path, item in paths.items():
        content = item.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            answer = server.post(path, json=example["value"])
            assert answer.status_code == 200, answer.text
            ran.append(path)
    assert {"/predict", "/predict/many", "/predict/a%20b%2Bc", "/v2/models/scalar/infer"} <= set(ran)
    assert {"/predict/brain", "/v2/models/brain/infer"} <= set(ran)


def test_more_strings_than_fit_are_refused_before_they_are_read(identities: Server) -> None:
    count = 500_000
    content = b"\1\0\0\0a" * count
    described = {
        "name": "x0",
        "datatype": "BYTES",
        # One more than the body has, which the server would find once all strings are read.
        "shape": [count + 1, 1],
        "parameters": {"binary_data_size": len(content)},
    }
    head = json.dumps({"inputs": [described]}).encode()
    answer = identities.post(
        "/v2/models/words/infer",
        content=head + content,
        headers={"inference-header-content-length": str(len(head))},
    )
    assert answer.status_code == 413
    assert f"{count + 1} strings" in answer.json()["error"]
