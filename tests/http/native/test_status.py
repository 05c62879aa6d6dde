"""`/status`, the golden samples of a version, and the examples of the document that come from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import httpx
import pytest

from tests.conftest import Serve
from tests.onnx_models import identity, save
from tests.server import Server, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, module_serve: Serve) -> Server:
    """A model with three golden samples, the second of which is too large to be shown."""
    folder = tmp_path_factory.mktemp("status") / "m"
    save(identity("FP32", ["N", 4]), folder / "1")
    (folder / "samples").mkdir()
    for name, rows in (("a", 1), ("b", 3000), ("c", 2)):
        sample = {"inputs": {"x": [[1, 2, 3, 4]] * rows}, "outputs": {"y": [[1, 2, 3, 4]] * rows}}
        (folder / "samples" / f"{name}.json").write_text(json.dumps(sample))
    return module_serve(folder.parent)


def test_a_version_has_the_digest_of_its_file(server: Server, tmp_path: Path) -> None:
    file = save(identity("FP32", ["N", 4]), tmp_path)
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert server.get("/models/m/1").json()["digest"] == expected


def test_small_golden_samples_can_be_read_and_run(server: Server) -> None:
    samples = server.get("/models/m/1/samples").json()["samples"]
    assert [sample["name"] for sample in samples] == ["a.json", "c.json"]
    for sample in samples:
        answer = server.post("/predict/m", json={"inputs": sample["inputs"]})
        assert answer.status_code == 200, answer.text
    assert server.get("/models/m/9/samples").json()["code"] == "version_not_found"


def test_the_examples_of_the_document_are_golden_samples(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    for path in ("/predict/m", "/v2/models/m/infer"):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        example = content["examples"]["m"]["value"]
        assert "[1, 2, 3, 4]" in json.dumps(example)
        assert server.post(path, json=example).status_code == 200


def test_the_figures_are_those_of_the_metrics(server: Server) -> None:
    for body, status in (({"inputs": [[1, 2, 3, 4]]}, 200), ({"inputs": [1]}, 422)):
        assert server.post("/predict/m", json=body).status_code == status
    counted = {code: int(server.metric("requests_total", model="m", code=code)) for code in ("200", "422")}

    def figures() -> dict[str, object]:
        [model] = server.get("/status").json()["models"]
        found: dict[str, object] = model["versions"][0]["figures"]
        return found

    wait_until(lambda: figures()["requests"] == counted, "the body is a second old at most")
    told = server.get("/status").json()
    assert told["health"] == server.get("/health").json()
    [model] = told["models"]
    known = server.get("/models").json()["models"][0]
    assert {name: model[name] for name in known if name != "versions"} == {
        name: value for name, value in known.items() if name != "versions"
    }
    found = model["versions"][0]["figures"]
    assert sum(found["duration"]["counts"]) == sum(counted.values())
    assert len(found["duration"]["counts"]) == len(found["duration"]["bounds"]) + 1
    assert sum(line["runs"] for line in found["batches"]) == sum(found["reasons"].values())
    assert told["server"]["cards"] == []


def test_a_poll_of_an_idle_server_costs_no_body(server: Server) -> None:
    def tag() -> str:
        found: str = server.get("/status").headers["etag"]
        return found

    wait_until(lambda: tag() == tag(), "the figures of the tests before are in the body")
    with httpx.Client(base_url=server.url) as client:
        answer = client.get("/status", headers={"if-none-match": tag()})
    assert answer.status_code == 304
