"""The contracts of SageMaker, Vertex AI, Azure ML, KServe and Cloud Run, over HTTP."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import in_both_engines
from tests.onnx_models import write_identity
from tests.people_model import write_people
from tests.platform_server import PlatformServer
from tests.server import Server, wait_until

PEOPLE = [{"age": 20.5, "city": "Bern"}, {"age": 30, "city": "Zug"}]
PREDICTIONS = [{"twice": [41.0], "town": "Bern"}, {"twice": [60.0], "town": "Zug"}]
SPLIT = {"columns": ["city", "age"], "data": [["Bern", 20.5], ["Zug", 30]]}
JSON = "application/json"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Server]:
    """The server as Vertex AI starts it, with paths of the user; its models are in a local folder."""
    repository = write_people(tmp_path_factory.mktemp("people"))
    server = PlatformServer(
        {
            "AIP_STORAGE_URI": repository.as_uri(),
            "AIP_PREDICT_ROUTE": "/my/predict",
            "AIP_HEALTH_ROUTE": "/my/health",
        },
        cache_dir=cache_dir,
    )
    server.wait_loaded()
    yield server
    server.kill()


def invoke(
    server: Server, content: Any, kind: str = JSON, path: str = "/invocations", **headers: str
) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = server.post(path, content=body, headers={"content-type": kind, **headers})
    assert answer.status_code == 200, answer.text
    return answer


def test_the_log_says_why_the_models_are_looked_for_there(people: Server) -> None:
    people.wait_for("the models are in .*: AIP_STORAGE_URI names it")


VERTEX = "/v1/endpoints/123/deployedModels/456"


@pytest.mark.parametrize("path", ["/ping", "/my/health", VERTEX, "/health/ready"])
def test_platforms_ask_whether_the_server_is_ready(people: Server, path: str) -> None:
    assert people.get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/invocations", "/score", "/my/predict", f"{VERTEX}:predict", "/my/predict?a=b"]
)
def test_each_path_of_predictions_takes_instances(people: Server, path: str) -> None:
    assert invoke(people, {"parameters": {}, "instances": PEOPLE}, path=path).json() == {
        "predictions": PREDICTIONS
    }


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (PEOPLE, JSON),
        ({"dataframe_records": PEOPLE}, JSON),
        ({"dataframe_split": SPLIT}, JSON),
        ({"records": PEOPLE}, JSON),
        ({"list": {"age": [20.5, 30], "city": ["Bern", "Zug"]}}, JSON),
        (b"20.5,Bern\n30,Zug\n", "text/csv"),
        (b"city,age\nBern,20.5\nZug,30\n", "text/csv; charset=utf-8"),
        (b"\n".join(json.dumps(row).encode() for row in PEOPLE), "application/jsonlines"),
        (b"\r\n\r\n".join(json.dumps(row).encode() for row in PEOPLE) + b"\n", "application/jsonlines"),
    ],
)
def test_invocations_take_the_content_types_of_sagemaker(people: Server, content: Any, kind: str) -> None:
    assert invoke(people, content, kind).json() == {"predictions": PREDICTIONS}


def test_a_native_body_gets_a_native_answer(people: Server) -> None:
    answer = invoke(people, {"inputs": {"age": [[1]], "city": ["a"]}}).json()
    assert answer["outputs"] == {"twice": [[2.0]], "town": ["a"]}


def test_the_answer_is_what_accept_asks_for(people: Server) -> None:
    answer = invoke(people, {"instances": PEOPLE}, accept="text/csv")
    assert (answer.headers["content-type"], answer.text) == ("text/csv", "41.0,Bern\n60.0,Zug\n")
    answer = invoke(people, {"instances": PEOPLE}, accept="application/jsonlines")
    assert [json.loads(line) for line in answer.text.splitlines()] == PREDICTIONS
    answer = invoke(people, {"instances": PEOPLE}, accept="application/x-npz")
    assert np.load(io.BytesIO(answer.content))["twice"].tolist() == [[41.0], [60.0]]


def test_the_native_route_takes_and_gives_tables(people: Server) -> None:
    answer = invoke(people, b"age,city\n20.5,Bern\n", "text/csv", "/predict/people", accept="text/csv")
    assert answer.headers["content-type"] == "text/csv; header=present"
    assert answer.text == "twice,town\n41.0,Bern\n"
    answer = invoke(people, {"model": "people", "dataframe_split": SPLIT}, path="/predict")
    assert answer.json()["outputs"] == {"twice": [[41.0], [60.0]], "town": ["Bern", "Zug"]}


def test_missing_values_are_nan_in_numbers_and_errors_in_strings(people: Server) -> None:
    """An empty cell is an empty string, and null is none."""
    for content, kind in (
        ({"records": [{"age": None, "city": "Bern"}]}, JSON),
        (b"age,city\n,Bern\n", "text/csv"),
        ({"dataframe_split": {"columns": ["age", "city"], "data": [[None, "Bern"]]}}, JSON),
    ):
        answer = invoke(people, content, kind, "/predict/people").json()
        assert answer["outputs"] == {"twice": [[None]], "town": ["Bern"]}
        assert answer["non_finite"] == ["twice"]
    answer = invoke(people, b"age,city\n1,\n", "text/csv", "/predict/people").json()
    assert answer["outputs"] == {"twice": [[2.0]], "town": [""]}
    refused = people.post("/predict/people", json={"records": [{"age": 1, "city": None}]})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_input")
    assert "city" in refused.json()["detail"]


def test_strings_of_pandas_come_in_an_archive_of_numpy(people: Server) -> None:
    """As text they are taken. As objects they would need pickle, and the error says what to send."""
    ages, cities = np.array([[1], [2]], np.float32), np.array(["Bern", "Zürich"], object)
    for column, status in ((cities.astype(str), 200), (cities, 422)):
        file = io.BytesIO()
        np.savez(file, age=ages, city=column)
        answer = people.post(
            "/predict/people", content=file.getvalue(), headers={"content-type": "application/x-npz"}
        )
        assert answer.status_code == status, answer.text
        assert "Zürich" in answer.text or "dtype" in answer.text


def test_pyarrow_writes_what_the_server_reads(people: Server) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(PEOPLE)
    parquet, stream = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    for sink, kind in ((parquet, "parquet"), (stream, "arrow.stream")):
        answer = invoke(people, sink.getvalue(), f"application/vnd.apache.{kind}")
        assert answer.json() == {"predictions": PREDICTIONS}


def test_errors_are_problems(people: Server) -> None:
    answer = people.post("/invocations", content=b"age\nx\n", headers={"content-type": "text/csv"})
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
    assert people.get("/invocations").status_code == 405


def test_a_header_names_one_of_several_models(tmp_path: Path, cache_dir: Path, stack: ExitStack) -> None:
    write_identity(tmp_path, "other", ["FP32"], ["rows", 2])
    server = PlatformServer({"INFERPOOL_REPOSITORY": str(write_people(tmp_path))}, cache_dir=cache_dir)
    stack.callback(server.kill)
    server.wait_loaded()
    named = {"X-Amzn-SageMaker-Custom-Attributes": "trace=5, model=other, version=1"}
    assert invoke(server, [[1, 2]], **named).json() == {"predictions": [[1.0, 2.0]]}
    answer = server.post("/invocations", json=[[1, 2]])
    assert answer.status_code == 422
    assert "must name" in answer.json()["detail"]


@in_both_engines
def test_a_mount_that_comes_late_is_waited_for(
    tmp_path: Path, cache_dir: Path, stack: ExitStack, engine_variables: dict[str, str]
) -> None:
    """KServe's flat layout, under the name of the service; the server is live and not ready before."""
    mount = tmp_path / "mnt"
    server = PlatformServer(
        {"INFERPOOL_REPOSITORY": str(mount), "INFERPOOL_REPOSITORY_WAIT_S": "100", **engine_variables},
        "--model_name",
        "service",
        cache_dir=cache_dir,
    )
    stack.callback(server.kill)
    wait_until(lambda: server.get("/health/live").status_code == 200, "the server is live")
    for path in ("/health/ready", "/ping", "/v2/health/ready", "/v1/models/service"):
        assert server.get(path).status_code == 503
    assert server.post("/v1/models/service:predict", json={"instances": [[1, 2]]}).status_code == 503
    write_identity(tmp_path / "made", "model", ["FP32"], ["rows", 2])
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.move(tmp_path / "made" / "model" / "1" / "model.onnx", flat / "model.onnx")
    mount.symlink_to(flat)
    server.wait_loaded()
    wait_until(lambda: server.get("/health/ready").status_code == 200, "the server is ready")
    assert server.get("/v1/models").json()["models"] == ["service"]
    for name in ("service", "model"):
        answer = server.post(f"/v1/models/{name}:predict", json={"instances": [[1, 2]]})
        assert answer.json() == {"predictions": [[1.0, 2.0]]}
    assert server.post("/predict/model", json={"inputs": [[1, 2]]}).json()["model"] == "service"


@in_both_engines
def test_a_mount_that_never_comes_ends_the_server(tmp_path: Path, engine_variables: dict[str, str]) -> None:
    environ = {**os.environ, **engine_variables, "INFERPOOL_REPOSITORY_WAIT_S": "0.5"}
    command = [sys.executable, "-m", "inferpool", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no models for 0.5 s" in done.stderr
