"""ResNet-50: the exact network of torchvision, from weights that are read without executing them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from inferpool.codecs.labels import read_labels
from PIL import Image

from tests.conftest import ROOT, Serve
from tests.models.built import assert_batched, build, documented_request
from tests.models.record import needs_to_run

MODEL = ROOT / "models/resnet50"
LAYERS = "537b1c87e6f187e4adb6923a34c01b5c077e82f8c4a64396d34dd2dbffe28f0d"
"""SHA-256 of the state dict of torchvision 0.28.0's resnet50, a line `name shape datatype` per tensor."""
LOGITS = (
    (1.0385, -0.4350, 0.4150, -1.2579, 0.7119, -0.7772, -0.7465, 0.7865),
    (1.0660, -0.5259, 0.2188, -1.2064, 0.7929, -0.7833, -0.9259, 0.9400),
)
"""Every 125th logit of torchvision 0.28.0's resnet50 for `waves`, with random weights of seed 0."""


def load_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_resnet50", MODEL / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_module()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    needs_to_run("resnet50")
    return script.random_weights(0)


def waves() -> np.ndarray:
    """Return two rows without a generator of random numbers."""
    return np.cos(np.arange(2 * 3 * 224 * 224) ** 1.01).reshape(2, 3, 224, 224).astype(np.float32)


def photograph() -> bytes:
    """Return a large JPEG that is not square: a gradient with a disc."""
    down, across = np.mgrid[0:300, 0:400]
    disc = (down - 150) ** 2 + (across - 200) ** 2 < 80**2
    pixels = np.stack([down % 256, across % 256, 255 * disc], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=95)
    return stream.getvalue()


def as_torchvision_does(picture: bytes) -> np.ndarray:
    """Do Resize(256), CenterCrop(224), ToTensor and Normalize with Pillow and numpy."""
    image: Image.Image = Image.open(io.BytesIO(picture))
    width, height = (int(256 * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    row = (pixels - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    return row.transpose(2, 0, 1)[None]


def test_the_network_is_that_of_torchvision(weights: dict[str, torch.Tensor]) -> None:
    """The layers have the same names, shapes and datatypes, and the network computes the same logits."""
    network = script.ResNet50().eval()
    state = network.state_dict()
    lines = (f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LAYERS
    assert sum(parameter.numel() for parameter in network.parameters()) == 25_557_032
    network.load_state_dict(weights)
    with torch.inference_mode():
        logits = network(torch.from_numpy(waves())).numpy()
    np.testing.assert_allclose(logits[:, ::125], LOGITS, atol=2e-4)


def test_a_model_built_from_weights_classifies_a_photograph(
    tmp_path: Path, weights: dict[str, torch.Tensor], serve: Serve
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(
        MODEL, repository / "resnet50", ignore=shutil.ignore_patterns("1", "samples", "__pycache__")
    )
    torch.save(weights, tmp_path / "mine.pth")
    run = build(repository, "resnet50", "--weights", tmp_path / "mine.pth")
    assert run.returncode == 0, run.stderr
    assert "ONNX Runtime and PyTorch differ by" in run.stdout

    file = repository / "resnet50/1/model.onnx"
    kinds = {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}
    assert kinds == {"Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool", "Flatten", "Gemm"}
    network = script.ResNet50().eval()
    network.load_state_dict(weights)
    with torch.inference_mode():
        eager = network(torch.from_numpy(waves())).numpy()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": waves()})
    np.testing.assert_allclose(logits, eager, atol=script.STATED_DIFFERENCE * np.abs(eager).max())

    server = serve(repository)
    (tmp_path / "photograph.jpg").write_bytes(photograph())
    answer = documented_request("resnet50", server, tmp_path)
    (expected,) = session.run(["logits"], {"image": as_torchvision_does(photograph())})
    # A pixel may be off by one of 255: Pillow rounds between the two directions of a resize.
    np.testing.assert_allclose(answer["outputs"]["logits"], expected, atol=0.02)
    labels = read_labels(MODEL / "labels.txt")
    best = [labels[index] for index in expected[0].argsort()[::-1][:5]]
    assert [prediction["label"] for prediction in answer["predictions"][0]] == best
    assert_batched(server, "resnet50")


def test_random_weights_need_no_file(tmp_path: Path) -> None:
    """`--help` names both options; one of them is required."""
    needs_to_run("resnet50")
    run = build(MODEL.parent, "resnet50", "--help")
    assert "--weights FILE" in run.stdout
    assert "--random-weights" in run.stdout
    run = build(MODEL.parent, "resnet50")
    assert run.returncode == 2
    assert "one of the arguments --weights --random-weights is required" in run.stderr
    first, again, other = (script.random_weights(seed)["fc.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_older_files_without_counters_are_read(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """torchvision's first file of these weights has no counters of batch normalisation."""
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(weights)
    torch.save(old, tmp_path / "old.pth")
    read = script.read_weights(tmp_path / "old.pth")
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


class Evil:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Path, ("run",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("layer3.5.bn2.running_var"), "has no layer3.5.bn2.running_var"),
        (lambda weights: weights.update({"fc.weight": torch.zeros(10, 2048)}), r"fc.weight is \[10, 2048\]"),
        (lambda weights: weights.update({"fc.bias": torch.full((1000,), torch.nan)}), "fc.bias has numbers"),
        (lambda weights: weights.update({"layer3.6.conv1.weight": torch.zeros(1)}), "also has layer3.6"),
        (lambda weights: weights.update({"fc.bias": Evil()}), "cannot be read as a state dict"),
    ],
)
def test_weights_of_something_else_are_refused(
    tmp_path: Path, weights: dict[str, torch.Tensor], change: object, words: str
) -> None:
    changed = dict(weights)
    assert callable(change)
    change(changed)
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match=words):
        script.read_weights(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [b"", b"no weights", pickle.dumps([1, 2])])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "none.pth").write_bytes(content)
    with pytest.raises(SystemExit, match=r"none.pth: (cannot be read as|is a list, not) a state dict"):
        script.read_weights(tmp_path / "none.pth")


def test_there_are_a_thousand_different_labels() -> None:
    labels = read_labels(MODEL / "labels.txt")
    assert len(labels) == 1000
    shown = {0: "tench", 134: "crane bird", 517: "crane", 638: "maillot", 639: "maillot tank suit",
             281: "tabby", 999: "toilet tissue"}  # fmt: skip
    assert {index: labels[index] for index in shown} == shown
