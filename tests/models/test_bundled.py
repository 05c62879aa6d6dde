"""The models of the project do what their cards say."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.image_config import ImageConfig
from inferpool.codecs.labels import LabelsCodec, LabelsConfig, read_labels
from inferpool.tensors import ANY, Array, Signature, TensorSpec

from tests.models.built import assert_batched
from tests.server import Server

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("diabetes", "digits", "forecast")
DIGITS = Signature((TensorSpec("image", "FP32", (ANY, 1, 8, 8)),), (TensorSpec("logits", "FP32", (ANY, 10)),))


def build_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"build_{name}", MODELS / name / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def session(name: str) -> onnxruntime.InferenceSession:
    file = MODELS / name / "1" / "model.onnx"
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def run(name: str, inputs: dict[str, Array]) -> dict[str, Array]:
    loaded = session(name)
    outputs = [output.name for output in loaded.get_outputs()]
    return dict(zip(outputs, loaded.run(outputs, inputs), strict=True))


def model_toml(name: str) -> dict[str, Any]:
    return tomllib.loads((MODELS / name / "model.toml").read_text())


@pytest.mark.parametrize(
    ("name", "takes", "gives"),
    [
        ("digits", ("image", [1, 8, 8]), ("logits", [10])),
        ("diabetes", ("features", [10]), ("progression", [1])),
        ("forecast", ("closes", [20]), ("forecast", [5])),
    ],
)
def test_the_signature_is_the_one_in_the_card_and_the_batch_is_dynamic(
    name: str, takes: tuple[str, list[int]], gives: tuple[str, list[int]]
) -> None:
    loaded = session(name)
    for (tensor,), (expected, sizes) in ((loaded.get_inputs(), takes), (loaded.get_outputs(), gives)):
        assert tensor.name == expected
        assert tensor.type == "tensor(float)"
        assert tensor.shape[1:] == sizes
        assert not isinstance(tensor.shape[0], int)


@pytest.mark.parametrize("name", NAMES)
def test_golden_samples_hold_within_their_tolerance(name: str) -> None:
    samples = list((MODELS / name / "samples").glob("*.json"))
    assert samples
    for file in samples:
        sample = json.loads(file.read_text())
        got = run(name, {key: np.array(rows, np.float32) for key, rows in sample["inputs"].items()})
        assert got.keys() == sample["outputs"].keys()
        for key, rows in sample["outputs"].items():
            assert len(rows) >= 2
            np.testing.assert_allclose(got[key], rows, rtol=0, atol=sample["tolerance"])


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_gives_the_same_answer_as_in_a_batch(name: str) -> None:
    (file,) = (MODELS / name / "samples").glob("*.json")
    ((key, rows),) = json.loads(file.read_text())["inputs"].items()
    tensor = np.array(rows, np.float32)
    ((_, together),) = run(name, {key: tensor}).items()
    for index in range(len(tensor)):
        ((_, alone),) = run(name, {key: tensor[index : index + 1]}).items()
        np.testing.assert_allclose(alone[0], together[index], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "next-word"])
def test_rows_of_several_requests_share_a_run(bundled: Server, name: str) -> None:
    assert_batched(bundled, name)


def test_every_bundled_model_has_a_test_of_its_batching() -> None:
    """The models that are built here, or in the files of tests named after them."""
    elsewhere = {"cifar10", "minilm", "news", "resnet50", "sentiment"}
    assert {file.parent.name for file in MODELS.glob("*/build.py")} == {*NAMES, "next-word"} | elsewhere


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_a_card_and_a_description(name: str) -> None:
    assert model_toml(name)["description"]
    assert (MODELS / name / "README.md").read_text().startswith(f"# {name}\n")


def test_all_models_together_are_under_four_megabytes(models: Path) -> None:
    files = [file for file in models.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4_000_000


@pytest.mark.parametrize("name", NAMES)
def test_the_build_script_prints_its_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, MODELS / name / "build.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--out DIR" in done.stdout
    assert "--seed N" in done.stdout


@pytest.fixture(scope="module")
def digits_codec() -> ImageCodec:
    return ImageCodec(ImageConfig(**model_toml("digits")["image"]), DIGITS)


@pytest.fixture(scope="module")
def digits_labels() -> LabelsCodec:
    config = LabelsConfig(**model_toml("digits")["labels"])
    return LabelsCodec(config, DIGITS, read_labels(MODELS / "digits" / config.file))


def test_held_out_digits_are_read_from_png(digits_codec: ImageCodec, digits_labels: LabelsCodec) -> None:
    build = build_script("digits")
    images, labels = build.held_out()
    assert len(images) == 360
    rows = []
    for image in images:
        file = io.BytesIO()
        build.to_picture(image).save(file, "PNG")
        rows.append(digits_codec.decode(file.getvalue())["image"])
    tensor = np.concatenate(rows)
    # The grey of a picture is v * 255 / 16, rounded: it differs by at most half a step of 255.
    np.testing.assert_allclose(tensor, build.to_rows(images), rtol=0, atol=0.5 / 255 + 1e-6)
    predictions = digits_labels.predictions(run("digits", {"image": tensor}))
    right = [best["label"] == str(label) for (best, *_), label in zip(predictions, labels, strict=True)]
    assert np.mean(right) >= build.STATED_ACCURACY >= 0.98


def test_the_split_is_repeatable_and_its_halves_share_no_row() -> None:
    build = build_script("digits")
    training, held_out, _, labels = build.split()
    again, _ = build.held_out()
    np.testing.assert_array_equal(held_out, again)
    assert len(training) + len(held_out) == 1797
    assert held_out.shape == (360, 8, 8)
    assert 0 <= held_out.min() < held_out.max() <= 16
    assert np.bincount(labels).min() >= 34


def test_the_sample_picture_is_plainly_a_seven(digits_codec: ImageCodec, digits_labels: LabelsCodec) -> None:
    tensors = digits_codec.decode((MODELS / "digits" / "samples" / "7.png").read_bytes())
    (predictions,) = digits_labels.predictions(run("digits", tensors))
    first, second, _ = predictions
    assert first["label"] == "7"
    assert float(first["score"] or 0) > 0.9
    assert float(second["score"] or 0) < 0.05


def test_diabetes_equals_the_regression_of_scikit_learn() -> None:
    build = build_script("diabetes")
    training_features, features, training_targets, targets = build.split()
    expected = build.fit(training_features, training_targets).predict(features)
    got = run("diabetes", {"features": features.astype(np.float32)})["progression"]
    np.testing.assert_allclose(got[:, 0], expected, rtol=0, atol=1e-3)
    unexplained = np.square(targets - got[:, 0]).sum() / np.square(targets - targets.mean()).sum()
    assert 1 - unexplained >= build.STATED_R2


def test_the_script_builds_the_committed_diabetes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = build_script("diabetes")
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path)])
    assert build.main() == 0
    assert "held-out R²" in capsys.readouterr().out
    rebuilt = onnxruntime.InferenceSession(tmp_path / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    features = build.split()[1].astype(np.float32)
    (got,) = rebuilt.run(["progression"], {"features": features})
    # The files are not equal byte for byte, because a file names the version of its converter.
    np.testing.assert_allclose(got, run("diabetes", {"features": features})["progression"], atol=1e-3)
    assert (tmp_path / "samples" / "held_out.json").exists()


def test_a_model_below_its_stated_quality_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = build_script("diabetes")
    monkeypatch.setattr(build, "STATED_R2", 0.99)
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path)])
    assert build.main() == 1
    assert "not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
