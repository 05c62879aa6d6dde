"""The workloads: models, inputs, and the right answers."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.batching import make_model
from benchmarks.formats import SIDE, write_mean
from benchmarks.peers.adapters.shared import Model, picture
from benchmarks.peers.environments import CACHE, NotHere
from benchmarks.peers.resnet import write_resnet50

ROOT = Path(__file__).parents[2]
LEVELS = (1, 16, 64, 256)
SAMPLES = 16
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sample:
    """One input, in every form that a workload needs, and the right answer."""

    rows: np.ndarray
    """(1, …), FP32, of few decimals."""
    jpeg: bytes
    text: str
    answer: np.ndarray


@dataclass(frozen=True)
class Workload:
    """A model and a kind of bodies."""

    name: str
    title: str
    model: str
    """The folder of the model: `row`, `image`, `resnet50`, `minilm` or `heavy`."""
    kind: str
    """`json`, `v2`, `binary`, `jpeg` or `text`."""
    rows: int
    """The largest batch that servers are told to make."""
    workers: int = 1
    """Sessions of one thread that servers are told to run at the same time."""
    levels: tuple[int, ...] = LEVELS
    stretch: float = 1.0
    """Factor for the length of loads: with few answers a second, one batch would change the figure."""
    queue: int = 0
    """If not 0, the workload is an overload, and this many requests may wait in servers with such a limit."""


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("row-json", "A row of 64 floats, JSON", "row", "json", 64),
        Workload("row-v2", "A row of 64 floats, `/v2` JSON", "row", "v2", 64),
        Workload("image-json", "An image of 150,528 floats, JSON", "image", "json", 8),
        Workload("image-binary", "An image of 602,112 bytes, binary", "image", "binary", 8),
        Workload("image-jpeg", "An image of 224×224 as JPEG", "image", "jpeg", 8),
        Workload(
            "resnet50", "ResNet-50 (random weights), binary", "resnet50", "binary", 4, workers=2, stretch=3
        ),
        Workload("minilm", "MiniLM, sentences of 3 to 30 words", "minilm", "text", 8, workers=2),
        Workload("overload", "Twice the capacity, open loop", "heavy", "json", 2, levels=(32,), queue=64),
    )
}


def model_file(workload: Workload) -> Path:
    """Return the ONNX file, and make it if it is missing; raises NotHere if it has to be built first."""
    if workload.model == "minilm":
        built = sorted((ROOT / "models" / "minilm").glob("[0-9]*/model.onnx"))
        if not built:
            raise NotHere("models/minilm is not built yet: run inferpool build minilm")
        return built[-1]
    folder = CACHE / "models"
    file = folder / workload.model / "1" / "model.onnx"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        MAKERS[workload.model](folder)
    return file


def make_row(folder: Path) -> None:
    make_model(folder / "row/1/model.onnx", hidden=128, layers=1)


def make_image(folder: Path) -> None:
    # The table is for the codec of images, which answers to bodies of image/jpeg.
    write_mean(folder, "image", [3, SIDE, SIDE], [2, 3])
    (folder / "image/model.toml").write_text('[image]\nmode = "rgb"\n')


def make_resnet(folder: Path) -> None:
    write_resnet50(folder / "resnet50/1/model.onnx")


def make_heavy(folder: Path) -> None:
    make_model(folder / "heavy/1/model.onnx", hidden=2048, layers=10)
    # The other servers get the same limits. The model is slow: the generator can send twice its capacity.
    config = "[batching]\nmax_rows = 2\n[instances]\ncount = 1\nthreads = 1\n"
    (folder / "heavy/model.toml").write_text(config)


MAKERS: dict[str, Callable[[Path], None]] = {
    "row": make_row,
    "image": make_image,
    "resnet50": make_resnet,
    "heavy": make_heavy,
}


@functools.cache
def samples(workload: Workload) -> tuple[Sample, ...]:
    """Return different inputs with ONNX Runtime's answer to each alone; raises NotHere like `model_file`."""
    model = Model(model_file(workload), "text" if workload.kind == "text" else "json")
    random = np.random.default_rng(7)
    made = []
    for number in range(SAMPLES):
        jpeg, text = b"", ""
        if workload.kind == "text":
            text = sentence(random, 3 + 27 * number // (SAMPLES - 1))
            rows = np.zeros((0,), np.float32)
        elif workload.kind == "jpeg":
            jpeg = make_jpeg(random)
            rows = picture(jpeg)
        else:
            rows = random.random((1, *model.shape)).round(5).astype(np.float32)
        answer = model.run([text if workload.kind == "text" else rows])
        made.append(Sample(rows, jpeg, text, answer[0]))
    return tuple(made)


def make_jpeg(random: np.random.Generator) -> bytes:
    """Return a picture that compresses like a photograph: smooth, with some noise."""
    across, down = np.meshgrid(np.linspace(0, 6, SIDE), np.linspace(0, 5, SIDE))
    phase = random.uniform(0, 6, 3)
    waves = np.stack(
        [np.sin(across + phase[0]), np.cos(down + phase[1]), np.sin(across + down + phase[2])], -1
    )
    noise = random.normal(0, 6, (SIDE, SIDE, 3))
    stream = io.BytesIO()
    Image.fromarray((128 + 90 * waves + noise).clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=85)
    return stream.getvalue()


WORDS = (
    *("the", "server", "answers", "a", "small", "request", "within", "one", "millisecond", "and", "says"),
    *("how", "long", "each", "part", "of", "it", "took", "while", "other", "people", "wait", "in", "line"),
)


def sentence(random: np.random.Generator, words: int) -> str:
    """Return `count` random words."""
    return " ".join(random.choice(WORDS, words))


def is_right(sample: Sample, headers: dict[str, str], body: bytes) -> bool:
    """Return whether an answer has the right numbers, in any form."""
    try:
        found = read_answer(headers, body)
    except (ValueError, LookupError, TypeError):
        return False
    expected = sample.answer.reshape(-1)
    return found.size == expected.size and np.allclose(found, expected, TOLERANCE, TOLERANCE)


def read_answer(headers: dict[str, str], body: bytes) -> np.ndarray:
    """The numbers of an answer: bare lists, `{"outputs": …}` of lists or by name, or `/v2`, also binary."""
    length = headers.get("inference-header-content-length")
    if length is not None and int(length) < len(body):
        return np.frombuffer(body[int(length) :], np.float32)
    outputs = json.loads(body)
    if isinstance(outputs, dict):
        outputs = outputs["outputs"]
    if isinstance(outputs, dict):
        [outputs] = outputs.values()
    if outputs and isinstance(outputs[0], dict):
        outputs = outputs[0]["data"]
    return np.array(outputs, np.float64).reshape(-1)
