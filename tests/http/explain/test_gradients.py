"""Integrated gradients through an engine of its own: Captum's values, completeness, refusals.

`tests/backends/torch/test_over_http.py` has them in a server of one process.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.backends.torch.networks import configure, described, digits, save_scripted
from tests.conftest import ENGINES, Serve
from tests.explain.models import seven
from tests.explain.networks import ROW, Constant, Curved, Halved, Hungry, Jumps, Overwrites
from tests.http.explain.test_explain import AS_PNG, PNG, error
from tests.server import ROOT, Server

METHOD = "method=integrated-gradients"
FROM_ZEROS = f"?{METHOD}&baseline=zeros"
CAPTUM = json.loads((ROOT / "tests/explain/captum_values.json").read_text())
LABELS = [str(number) for number in range(10)]
BOUNDED = "[batching]\nmax_rows = 16\n[instances]\ncount = 1\nthreads = 1\n"
"""These are not measured, which takes as long as the tests."""


@pytest.fixture(scope="module")
def server(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("gradients")
    four = described(x=("FP32", [-1, 4]))
    pictures = (ROOT / "models/digits/model.toml").read_text() + described(input=("FP32", [-1, 1, 8, 8]))
    for name, module, settings in (
        ("digits", digits(), pictures),
        ("curved", Curved(), four),
        ("constant", Constant(), four),
        ("jumps", Jumps(), four),
        ("hungry", Hungry(), four),
        ("halved", Halved(), described(n=("INT64", [-1, 3]))),
        ("overwrites", Overwrites(), described(x=("FP32", [-1, 4]), scale=("FP32", [-1, 4]))),
    ):
        configure(save_scripted(folder / name / "1/model.pt", module), f"{settings}\n{BOUNDED}")
    shutil.copy(ROOT / "models/digits/labels.txt", folder / "digits")
    shutil.copytree(ROOT / "models/diabetes", folder / "diabetes")
    return module_serve(folder, "--trust", "--explain-max-passes", "2000", **ENGINES["process"])


def explain(server: Server, path: str, **request: Any) -> Any:
    """The explanation of a request's only row, which adds up if it says so."""
    answer = server.post(path, **request)
    assert answer.status_code == 200, answer.text
    [found] = answer.json()["explanations"]
    difference = abs(found["base"] + math.fsum(amounts(found)) - found["value"])
    assert found["additivity"]["holds"] == (difference <= 0.01 * abs(found["value"]))
    assert (found["method"], found["scale"], found["exact"]) == ("integrated-gradients", "outputs", False)
    return found


def amounts(found: Any) -> list[float]:
    parts = found.get("contributions")
    if parts is None:
        flat: list[float] = np.array(found["heat_map"]["contributions"]).reshape(-1).tolist()
        return flat
    return [part["contribution"] for part in parts]


def test_the_columns_of_a_network_contribute_what_captum_says(server: Server) -> None:
    path = f"/explain/curved{FROM_ZEROS}&target=1"
    table = {"dataframe_split": {"columns": ["a", "b", "c", "d"], "data": [ROW]}}
    found = explain(server, path, json=table)
    np.testing.assert_allclose(amounts(found), CAPTUM["curved"], atol=1e-5)
    assert [part["column"] for part in found["contributions"]] == ["a", "b", "c", "d"]
    assert {part["standard_error"] for part in found["contributions"]} == {None}
    assert (found["steps"], found["passes"], found["complete"]) == (50, 52, True)
    assert found["additivity"]["holds"]
    again = explain(server, path, json=table)
    assert again == found


def test_the_pixels_of_a_picture_contribute_what_captum_says(server: Server) -> None:
    path = f"/explain/digits{FROM_ZEROS}&target=7"
    as_numbers = explain(server, path, json={"inputs": [seven().tolist()]})
    np.testing.assert_allclose(amounts(as_numbers), CAPTUM["digits"], atol=1e-5)
    assert (as_numbers["kind"], as_numbers["label"]) == ("patches", "7")
    # A picture as a file goes the same way, and has the same answer as a heat map and as a picture.
    as_picture = explain(server, path, content=PNG, headers=AS_PNG)
    assert np.array(as_picture["heat_map"]["contributions"]).shape == (8, 8)
    assert as_picture["additivity"]["holds"]
    assert as_picture["base"] == pytest.approx(as_numbers["base"])
    patches = explain(server, f"{path}&patch=4", content=PNG, headers=AS_PNG)
    whole = np.array(as_picture["heat_map"]["contributions"]).reshape(2, 4, 2, 4).sum((1, 3))
    np.testing.assert_allclose(patches["heat_map"]["contributions"], whole, atol=1e-6)
    answer = server.post(path, content=PNG, headers={**AS_PNG, "accept": "image/png"})
    assert Image.open(io.BytesIO(answer.content)).size == (224, 224)


def test_steps_are_added_until_the_sum_holds_or_the_passes_end(server: Server) -> None:
    found = explain(server, f"/explain/curved{FROM_ZEROS}&target=1&passes=5", json={"inputs": [ROW]})
    assert (found["steps"], found["passes"]) == (3, 5)
    jumps = explain(server, f"/explain/jumps{FROM_ZEROS}&passes=400", json={"inputs": [ROW]})
    assert (jumps["steps"], jumps["passes"], jumps["complete"]) == (200, 352, True)
    assert not jumps["additivity"]["holds"]
    assert amounts(jumps) == pytest.approx(0.1 * np.array(ROW))


def test_a_model_that_is_not_batched_and_writes_to_its_input(server: Server) -> None:
    body = {"inputs": {"x": [ROW], "scale": [[1.0, 2.0, 3.0, 4.0]]}}
    found = explain(server, f"/explain/overwrites{FROM_ZEROS}", json=body)
    # Of 2·x·scale both get half, and x has the mean beside it.
    products = np.array(ROW) * [1, 2, 3, 4]
    assert amounts(found) == pytest.approx([*(products + 2 * np.array(ROW)), *products], abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (f"/explain/diabetes?{METHOD}", {"inputs": [[0.0] * 10]}, "onnxruntime runs this one"),
        (f"/explain/halved?{METHOD}", {"inputs": [[1, 2, 3]]}, 'tensor "n" is INT64'),
        (f"/explain/constant?{METHOD}", {"inputs": [ROW]}, 'output "output_0" has no gradients'),
        (f"/explain/digits?{METHOD}&scale=scores", {"inputs": [np.zeros((1, 8, 8)).tolist()]}, "not scores"),
        (f"/explain/curved?{METHOD}&passes=3", {"inputs": [ROW]}, "need 4 passes"),
    ],
)
def test_what_has_no_gradients_is_refused_with_what_is_possible(
    server: Server, path: str, body: Any, said: str
) -> None:
    status, _, text = error(server, path, json=body)
    assert (status, said in text) == (422, True), text
    assert "passes" in said or "scores" in said or "kernel, permutation or occlusion" in text


def test_gradients_for_which_memory_is_lacking_are_refused_like_a_prediction(server: Server) -> None:
    assert server.post("/predict/hungry", json={"inputs": [ROW]}).status_code == 200
    status, code, text = error(server, f"/explain/hungry{FROM_ZEROS}", json={"inputs": [ROW]})
    assert (status, code) == (503, "overloaded")
    assert "memory ran out while the model ran this request" in text


def test_a_client_cannot_ask_for_gradients_as_outputs(server: Server) -> None:
    body = {"inputs": [ROW], "outputs": ['\0gradient ["output_0", 0, "x", true]']}
    assert error(server, "/predict/curved", json=body)[:2] == (422, "invalid_input")
    assert server.post("/predict/curved", json={"inputs": [ROW]}).status_code == 200
