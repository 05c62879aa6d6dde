"""The protocol V1 over HTTP: instances by rows, inputs by columns, names, states and errors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.http.problems import STATUSES
from inferpool.tensors import ANY, Signature, TensorSpec
from inferpool.wire.native_json import parse_request
from inferpool.wire.v1_request import parse_instances
from inferpool.wire.v1_response import write_lines, write_outputs, write_predictions

from tests.conftest import Serve
from tests.onnx_models import write_identity
from tests.people_model import write_people
from tests.server import Server

PEOPLE = [{"age": 20.5, "city": "Bern"}, {"age": 30, "city": "Zug"}]
PREDICTIONS = [{"twice": [41.0], "town": "Bern"}, {"twice": [60.0], "town": "Zug"}]
MATRIX = Signature((TensorSpec("x", "FP32", (ANY, 2)),), (TensorSpec("y", "FP32", (ANY, 2)),))


@pytest.fixture(scope="module")
def server(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    repository = write_people(tmp_path_factory.mktemp("v1"))
    write_identity(repository, "same", ["FP32"], ["rows", 2])
    return module_serve(repository, "--measure-ms", "0")


def predict(server: Server, path: str, body: Any) -> Any:
    answer = server.post(f"/v1/models/{path}:predict", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def error(server: Server, path: str, body: Any) -> tuple[str, str]:
    """Check that the response is an error of this protocol, and return its code and text."""
    answer = server.post(f"/v1/models/{path}:predict", json=body)
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found.keys() == {"error", "code"}
    assert answer.status_code == STATUSES[found["code"]]
    return found["code"], found["error"]


@pytest.mark.parametrize("path", ["people", "people/versions/1"])
def test_objects_are_rows(server: Server, path: str) -> None:
    assert predict(server, path, {"instances": PEOPLE}) == {"predictions": PREDICTIONS}


def test_values_are_rows_of_the_only_input(server: Server) -> None:
    rows = [[1.5, 2.0], [3.0, 4.25]]
    assert predict(server, "same", {"instances": rows}) == {"predictions": rows}
    named = [{"x0": row} for row in rows]
    assert predict(server, "same", {"signature_name": "serving_default", "instances": named}) == {
        "predictions": rows
    }


def test_whole_inputs_give_whole_outputs(server: Server) -> None:
    assert predict(server, "people", {"inputs": {"age": [[1], [2]], "city": ["a", "b"]}}) == {
        "outputs": {"twice": [[2.0], [4.0]], "town": ["a", "b"]}
    }
    assert predict(server, "same", {"inputs": [[1, 2]]}) == {"outputs": [[1.0, 2.0]]}


def test_errors_name_what_is_wrong(server: Server) -> None:
    assert error(server, "nobody", {"instances": []})[0] == "model_not_found"
    assert error(server, "same/versions/7", {"instances": []})[0] == "version_not_found"
    for body, said in (
        ({"instances": [[1]]}, "has shape [1, 1]"),
        ({"instances": 5}, '"instances" is 5'),
        ({"instances": [[1, 2]], "inputs": [[1, 2]]}, "both"),
        ({"rows": []}, '"rows"'),
        ({}, "neither"),
    ):
        code, text = error(server, "same", body)
        assert (code, said in text) == ("invalid_input", True), text
    assert "without names" in error(server, "people", {"instances": [1]})[1]
    assert '"city" at [0] is null' in error(server, "people", {"instances": [{"age": 1, "city": None}]})[1]
    answer = server.post("/v1/models/same:predict", content=b"x", headers={"content-type": "text/csv"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert server.get("/v1/models/same:predict").status_code == 405
    # Some clients encode the colon.
    encoded = server.post("/v1/models/same%3Apredict", json={"instances": [[1.0, 2.0]]})
    assert encoded.json() == {"predictions": [[1.0, 2.0]]}


def test_models_and_their_states(server: Server) -> None:
    fields = {"object": "model", "created": 0, "owned_by": "inferpool"}
    names = ["people", "same"]
    data = [{"id": name, **fields} for name in names]
    assert server.get("/v1/models").json() == {"models": names, "object": "list", "data": data}
    status = [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}]
    expected = {"id": "same", **fields, "name": "same", "ready": True, "model_version_status": status}
    assert server.get("/v1/models/same").json() == expected
    assert server.get("/v1/models/same/versions/1").json() == expected
    missing = server.get("/v1/models/nobody")
    assert (missing.status_code, missing.json()["code"]) == (404, "model_not_found")


def test_many_rows_are_answered_in_the_background(server: Server) -> None:
    """Objects with more values than tensors would have are taken, and large answers are whole."""
    count = 20_000
    rows = [{"age": number, "city": f"c{number}"} for number in range(count)]
    answer = predict(server, "people", {"instances": rows})["predictions"]
    assert len(answer) == count
    assert answer[-1] == {"twice": [2.0 * (count - 1)], "town": f"c{count - 1}"}


@given(st.lists(st.tuples(st.floats(width=32), st.integers(-9, 9)), min_size=1), st.booleans())
def test_instances_are_the_same_as_inputs(rows: list[tuple[float, int]], as_objects: bool) -> None:
    """Each way to write rows gives the tensor that `inputs` of the native API gives."""
    finite = [[value if np.isfinite(value) else None, other] for value, other in rows]
    instances = [{"x": row} for row in finite] if as_objects else finite
    found = parse_instances(json.dumps({"instances": instances}).encode()).tensors(MATRIX)
    native = parse_request(json.dumps({"inputs": {"x": finite}}).encode()).tensors(MATRIX)
    np.testing.assert_array_equal(found["x"], native["x"])


def test_one_value_a_row_stands_for_a_column() -> None:
    column = Signature((TensorSpec("x", "INT64", (ANY, 1)),), ())
    for body in (b'{"instances":[1,2]}', b'{"instances":[{"x":1},{"x":2}]}', b'{"instances":[[1],[2]]}'):
        assert parse_instances(body).tensors(column)["x"].tolist() == [[1], [2]]


def test_answers_in_pieces_are_valid_json() -> None:
    """Rows of several outputs, numbers that are not finite, and outputs without rows in common."""
    many = {"a": np.arange(3000, dtype=np.float32), "b": np.ones((3000, 3), np.int64)}
    rows = json.loads(b"".join(write_predictions(many, ())))["predictions"]
    assert rows == [{"a": float(number), "b": [1, 1, 1]} for number in range(3000)]
    lines = b"".join(write_lines(many, ())).splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert b"".join(write_predictions({"a": np.array([np.nan, 1.0])}, ())) == b'{"predictions":[null,1.0]}'
    apart = {"a": np.zeros(2, np.int64), "b": np.zeros(1, np.int64)}
    assert b"".join(write_predictions(apart, ())) == b'{"predictions":{"a":[0,0],"b":[0]}}'
    assert b"".join(write_outputs(apart, ())) == b'{"outputs":{"a":[0,0],"b":[0]}}'
    bits = np.array([0x3F80], np.uint16)
    assert b"".join(write_predictions({"a": bits}, ("a",))) == b'{"predictions":[1.0]}'
