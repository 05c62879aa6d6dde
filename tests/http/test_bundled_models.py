"""The bundled models over HTTP: their answers are right, batched and counted."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import json
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tests.clients import Client
from tests.conftest import ROOT
from tests.server import Server

CLIENTS = 64


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray]:
    """The fifth of the digits that the model was not trained on: pictures (0 to 16) and labels."""
    spec = importlib.util.spec_from_file_location("build_digits", ROOT / "models/digits/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.held_out()


def as_png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.round(picture.astype(float) * 255 / 16).astype(np.uint8), "L").save(stream, "png")
    return stream.getvalue()


def test_digits_from_64_clients_are_right_batched_and_answered_once(
    bundled: Server, held_out: tuple[np.ndarray, np.ndarray]
) -> None:
    pictures, labels = held_out
    bodies = [as_png(picture) for picture in pictures]
    before = bundled.metric("requests_total", model="digits")
    good = bundled.metric("requests_total", model="digits", code="200")
    batches = bundled.metric("batch_rows_count", model="digits")
    rows = bundled.metric("batch_rows_sum", model="digits")
    rounds = 2

    answers: list[dict[str, Any]] = [{}] * (rounds * len(bodies))

    async def ask(clients: list[Client]) -> None:
        # All clients send before any reads. So the server has 64 requests at once, even if clients that
        # share its cores are too slow to keep 64 under way.
        for first in range(0, len(answers), CLIENTS):
            asked = list(zip(range(first, min(first + CLIENTS, len(answers))), clients, strict=False))
            for index, client in asked:
                headers = {"content-type": "image/png", "x-request-id": f"picture-{index}"}
                client.send("/predict/digits", bodies[index % len(bodies)], headers)
            for index, client in asked:
                reply = await client.receive()
                assert reply.status == 200
                assert reply.headers["x-request-id"] == f"picture-{index}"
                assert not answers[index]
                answers[index] = json.loads(reply.body)

    async def connect_and_ask() -> None:
        clients = [await Client.connect(bundled.port) for _ in range(CLIENTS)]
        await ask(clients)
        for client in clients:
            await client.close()

    asyncio.run(connect_and_ask())

    said = np.array([int(answer["predictions"][0][0]["label"]) for answer in answers[: len(labels)]])
    assert np.mean(said == labels) >= 0.98
    session = onnxruntime.InferenceSession(ROOT / "models/digits/1/model.onnx")
    scaled = np.array([np.asarray(Image.open(io.BytesIO(body))) for body in bodies], np.float32) / 255
    alone = np.concatenate([session.run(["logits"], {"image": row[None, None]})[0] for row in scaled])
    for number in range(rounds):
        part = answers[number * len(bodies) : (number + 1) * len(bodies)]
        served = np.array([answer["outputs"]["logits"][0] for answer in part])
        np.testing.assert_allclose(served, alone, atol=1e-5)

    assert bundled.metric("requests_total", model="digits") - before == len(answers)
    assert bundled.metric("requests_total", model="digits", code="200") - good == len(answers)
    assert bundled.metric("batch_rows_sum", model="digits") - rows == len(answers)
    mean_rows = len(answers) / (bundled.metric("batch_rows_count", model="digits") - batches)
    assert mean_rows > 4
    assert bundled.metric("in_flight_requests") == 0


def test_diabetes_answers_its_golden_sample(bundled: Server) -> None:
    sample = json.loads((ROOT / "models/diabetes/samples/held_out.json").read_text())
    answer = bundled.post("/predict/diabetes", json={"inputs": sample["inputs"], "id": "mine"}).json()
    assert (answer["model"], answer["version"], answer["id"]) == ("diabetes", "1", "mine")
    np.testing.assert_allclose(
        answer["outputs"]["progression"], sample["outputs"]["progression"], rtol=sample["tolerance"]
    )


def test_the_same_rows_answer_the_same_in_every_format(bundled: Server) -> None:
    rows = np.random.default_rng(1).uniform(20, 80, (3, 10)).astype(np.float32)
    npy = io.BytesIO()
    np.save(npy, rows)
    npz = io.BytesIO()
    np.savez(npz, features=rows)
    bodies: list[tuple[object, tuple[str, bytes] | None, str]] = [
        ({"inputs": {"features": rows.tolist()}}, None, "/predict/diabetes"),
        ({"inputs": rows.tolist()}, None, "/predict/diabetes/1"),
        ({"inputs": rows.tolist(), "model": "diabetes"}, None, "/predict"),
        (None, ("application/x-npy", npy.getvalue()), "/predict/diabetes"),
        (None, ("application/x-npz", npz.getvalue()), "/predict/diabetes"),
    ]
    answers = []
    for document, raw, path in bodies:
        if raw is None:
            answer = bundled.post(path, json=document)
        else:
            answer = bundled.post(path, content=raw[1], headers={"content-type": raw[0]})
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["outputs"])
    assert all(answer == answers[0] for answer in answers)
    as_npy = bundled.post(
        "/predict/diabetes", json={"inputs": rows.tolist()}, headers={"accept": "application/x-npy"}
    )
    assert as_npy.headers["content-type"] == "application/x-npy"
    np.testing.assert_allclose(np.load(io.BytesIO(as_npy.content)), answers[0]["progression"], rtol=1e-6)
    as_npz = bundled.post(
        "/predict/diabetes", json={"inputs": rows.tolist()}, headers={"accept": "application/x-npz"}
    )
    arrays = np.load(io.BytesIO(as_npz.content))
    np.testing.assert_allclose(arrays["progression"], answers[0]["progression"], rtol=1e-6)


def test_every_answer_has_an_id_and_its_timing(bundled: Server) -> None:
    for path in ("/models", "/health", "/health/live", "/metrics", "/openapi.json", "/nowhere"):
        answer = bundled.get(path, headers={"x-request-id": "abc"})
        assert answer.headers["x-request-id"] == "abc"
        assert "total;dur=" in answer.headers["server-timing"]
    answer = bundled.post("/predict/diabetes", json={"inputs": [[1.0] * 10]})
    assert answer.headers["x-request-id"]
    names = [part.split(";dur=")[0].strip() for part in answer.headers["server-timing"].split(",")]
    assert names == ["queue", "compute", "total"]
    unfit = bundled.get("/models", headers={"x-request-id": "two words"}).headers["x-request-id"]
    assert unfit != "two words"
    assert unfit


def test_models_tell_what_they_take_and_how_they_batch(bundled: Server) -> None:
    models = {model["name"]: model for model in bundled.get("/models").json()["models"]}
    assert models.keys() == {"diabetes", "digits", "forecast", "next-word"}
    version = models["digits"]["versions"][0]
    assert version["state"] == "ready"
    assert version["inputs"] == [
        {"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8], "optional": False}
    ]
    assert version["batching"]["enabled"]
    assert version["batching"]["max_rows"] > 1
    # How many of them pay is measured.
    assert version["instances"]
    assert all(instance == {"device": "cpu", "state": "ready"} for instance in version["instances"])
    detail = bundled.get("/models/digits").json()
    assert detail["default"] == 1
    assert detail["versions"][0]["latency"]
    assert bundled.get("/models/digits/1").json()["latency"]


def test_the_document_describes_what_is_served_and_its_examples_run(bundled: Server) -> None:
    document = bundled.get("/openapi.json").json()
    assert {"/predict", "/predict/{model}", "/predict/{model}/{version}", "/models"} <= document[
        "paths"
    ].keys()
    operation = document["paths"]["/predict"]["post"]
    for name, example in operation["requestBody"]["content"]["application/json"]["examples"].items():
        answer = bundled.post("/predict", json=example["value"])
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
    own = document["paths"]["/predict/digits"]["post"]["requestBody"]["content"]
    assert "image/png" in own
    assert "image/png" not in document["paths"]["/predict/diabetes"]["post"]["requestBody"]["content"]


@pytest.mark.parametrize("form", ["string", "object", "named"])
def test_pictures_are_instances_of_v1(bundled: Server, form: str) -> None:
    files = [(ROOT / "models/digits/samples" / f"{name}.png").read_bytes() for name in (7, 7)]
    texts = [base64.b64encode(file).decode() for file in files]
    rows: list[Any] = texts if form == "string" else [{"b64": text} for text in texts]
    rows = [{"image": row} for row in rows] if form == "named" else rows
    native = bundled.post("/predict/digits", content=files[0], headers={"content-type": "image/png"})
    expected = native.json()["outputs"]["logits"][0]
    answer = bundled.post("/v1/models/digits:predict", json={"instances": rows})
    assert answer.json() == {"predictions": [expected, expected]}
    whole = bundled.post("/v1/models/digits:predict", json={"inputs": {"image": rows[:1]}})
    assert whole.status_code == (422 if form == "named" else 200)
    wrong = bundled.post("/v1/models/digits:predict", json={"instances": [{"b64": "?"}]})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_input")
    assert "base64" in wrong.json()["error"]
