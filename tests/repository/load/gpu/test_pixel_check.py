"""Pictures for an FP32 input on GPUs: where they are normalised, what `/models` shows, and batches."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.http.predict.request_metrics import RequestMetrics, RequestStats
from inferpool.http.predict.served_version import ServedVersion
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Entry, VersionKey
from inferpool.repository.catalog import READY
from inferpool.repository.repository import Repository
from inferpool.settings import Settings
from inferpool.tensors import ANY, TensorSpec
from PIL import Image

from tests.fake_gpu import PICTURES, FakeBackend, FakeCard, FakeDriver, expected
from tests.pool.bench import Outbox
from tests.server import PATCHES, ROOT, Server

FAKE = ROOT / "tests" / "fake_gpu"
KEY = VersionKey("m", 1)
CONFIG = '[image]\nmode = "grey"\nlayout = "HW"\nmean = 0.5\nstd = 0.25\n'

Load = Callable[..., Repository]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load a fake model of pictures; its memory is freed after the test."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FAKE}")
    FakeBackend.reset()
    made: list[Repository] = []

    def start(config: str = "", behaviour: str = "", **settings: Any) -> Repository:
        folder = tmp_path / "repository" / "m"
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.fakegpu").write_text(PICTURES + behaviour)
        (folder / "model.toml").write_text(CONFIG + config)
        chosen = Settings(cache_dir=tmp_path / "cache", measure_ms=0, **settings)
        made.append(Repository(folder.parent, chosen, Outbox(), Metrics({}), time.monotonic, FakeDriver()))
        made[-1].load_now()
        return made[-1]

    yield start
    for repository in made:
        assert repository.drain(10)
        repository.close()
    assert all(model.closed for model in FakeBackend.loaded)


def view(repository: Repository) -> Any:
    shown = repository.models()["m"].versions[1]
    assert shown.state == READY, shown.reason
    return shown


def picture(*pixels: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8).reshape(2, 2)).save(file, "PNG")
    return file.getvalue()


def numbers(*pixels: int) -> np.ndarray:
    """The row of numbers that a picture becomes."""
    scaled = (np.array(pixels, np.float64).reshape(1, 2, 2) / 255 - 0.5) / 0.25
    return scaled.astype(np.float32)


def ask(repository: Repository, body: bytes) -> float:
    """The output of the version for a picture that its codec has decoded."""
    inputs = view(repository).image.decode(body)
    pool = repository.loaded(KEY).pool
    pool.offer(Entry(1, KEY, inputs, 1, "x", inputs["x"].nbytes, time.monotonic()))
    outbox: Any = pool._outbox
    [result] = outbox.take(1).values()
    assert result.outputs is not None, result.error
    return float(result.outputs["sum"][0])


def test_on_gpus_every_instance_normalises_pixels(load: Load) -> None:
    """Each instance has tried pixels on every batch size; the copies for measuring have not."""
    repository = load()
    assert view(repository).gpu.pixels == "normalised on cuda:0, cuda:1"
    assert view(repository).image.pixel_spec.datatype == "UINT8"
    serving = [model for model in FakeBackend.loaded if not model.closed]
    assert [model.pixels for model in serving] == [31 + 15 + 7 + 3 + 1 + 1] * 4
    assert {model.options.gpu.normalisation for model in FakeBackend.loaded if model.closed} == {None}
    assert ask(repository, picture(0, 50, 100, 255)) == expected(numbers(0, 50, 100, 255))[0]
    assert sum(model.pixels for model in serving) == 4 * 58 + 1


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        ("none", "its runtime cannot"),
        ("wrong", 'output "sum" differs by [0-9.]+ .* when 31 pictures are normalised on the GPU'),
    ],
)
def test_a_model_that_cannot_normalise_gets_numbers_and_the_reason_is_shown(
    pictures: str, reason: str, load: Load
) -> None:
    FakeBackend.pictures = pictures
    repository = load()
    assert view(repository).image.pixel_spec is None
    assert re.fullmatch(f"normalised on the CPU: {reason}", view(repository).gpu.pixels)
    assert ask(repository, picture(0, 50, 100, 255)) == expected(numbers(0, 50, 100, 255))[0]


def test_on_the_cpu_the_codec_normalises(load: Load) -> None:
    repository = load(devices=("cpu",))
    assert view(repository).image.pixel_spec is None
    assert {model.options.gpu.normalisation for model in FakeBackend.loaded} == {None}
    assert ask(repository, picture(1, 2, 3, 4)) == expected(numbers(1, 2, 3, 4))[0]


def test_without_buckets_pixels_are_tried_on_one_row_and_on_the_largest_batch(load: Load) -> None:
    FakeBackend.leaks = True
    repository = load("[instances]\ncount = 1\n")
    assert repository.live(KEY).buckets == ()
    assert view(repository).gpu.pixels == "normalised on cuda:0, cuda:1"
    most = view(repository).batching.max_rows
    assert [model.pixels for model in FakeBackend.loaded if not model.closed] == [most + 1] * 2
    assert ask(repository, picture(9, 8, 7, 6)) == expected(numbers(9, 8, 7, 6))[0]


def test_pixels_that_find_no_memory_halve_the_largest_bucket_while_serving(load: Load) -> None:
    """Every picture is answered all the same."""
    FakeBackend.cards = {"cuda:0": FakeCard(), "cuda:1": FakeCard()}
    repository = load('[instances]\ndevices = ["cuda:0"]\ncount = 1\n')
    FakeBackend.cards["cuda:0"].room_rows = 3
    [(_, model)] = repository.loaded(KEY).copies.models
    pixels = view(repository).image.decode(picture(5, 6, 7, 8))["x"]
    answer = model.run({"x": np.repeat(pixels, 30, axis=0)})["sum"]
    assert answer.tolist() == [expected(numbers(5, 6, 7, 8))[0]] * 30
    assert repository.live(KEY).buckets == (1, 2)


def test_a_tensorrt_engine_is_tried_with_pixels_before_it_takes_over(load: Load) -> None:
    FakeBackend.engines = True
    config = '[gpu]\ntensorrt = true\n[instances]\ndevices = ["cuda:0"]\ncount = 1\n'
    repository = load(config, "right")
    assert repository.loaded(KEY).copies.await_upgrade(60)
    assert repository.live(KEY).tensorrt == "TensorRT serves"
    made = FakeBackend.loaded[-1]
    assert (made.engine, made.pixels) == ("right", 58)
    assert ask(repository, picture(0, 50, 100, 255)) == expected(numbers(0, 50, 100, 255))[0]
    assert made.pixels == 59


def test_cuda_goes_on_serving_if_the_tensorrt_engine_cannot_normalise(load: Load) -> None:
    FakeBackend.engines = True
    config = '[gpu]\ntensorrt = true\n[instances]\ndevices = ["cuda:0"]\ncount = 1\n'
    repository = load(config, "blind")
    assert repository.loaded(KEY).copies.await_upgrade(60)
    assert repository.live(KEY).tensorrt == "CUDA serves: this engine is blind"
    assert ask(repository, picture(0, 50, 100, 255)) == expected(numbers(0, 50, 100, 255))[0]


@pytest.mark.parametrize("shape", [(ANY, 2, 2), (ANY, ANY, ANY), None])
def test_pixels_and_numbers_share_no_batch_whatever_the_shape(
    shape: tuple[int, ...] | None, load: Load
) -> None:
    """Pixels share batches with pixels, and numbers with numbers."""
    shown = view(load())
    signature = replace(shown.signature, inputs=(TensorSpec("x", "FP32", shape),))
    served = ServedVersion(
        replace(shown, signature=signature), RequestMetrics(Metrics({}), "m", "1", RequestStats())
    )
    pixels, others = (shown.image.decode(picture(*range(low, low + 4))) for low in (0, 10))
    rows = {"x": numbers(1, 2, 3, 4)}
    assert served.group(1, pixels, 1) == served.group(2, others, 1)
    assert served.group(3, rows, 1) == served.group(4, {"x": rows["x"] * 2}, 1)
    assert served.group(1, pixels, 1)[0] != served.group(3, rows, 1)[0]
    # This holds for equal shapes, too: a grey picture without its last dimension has the shape of numbers.
    assert served.group(1, {"x": rows["x"].astype(np.uint8)}, 1)[0] != served.group(3, rows, 1)[0]


# Through a real server.


@pytest.fixture
def fake_server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "repository" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.fakegpu").write_text(PICTURES)
    # Long enough for the clients on a busy machine to ask within the delay.
    batching = "[batching]\nmax_delay_ms = 100\n[instances]\ncount = 1\n"
    (folder / "model.toml").write_text(CONFIG + batching)
    environ = {
        "PYTHONPATH": f"{ROOT}:{FAKE}:{PATCHES}",
        "INFERPOOL_CACHE_DIR": str(tmp_path / "cache"),
        "INFERPOOL_MEASURE_MS": "0",
    }
    server = Server(folder.parent, ["--devices", "cuda:0"], environ, "tests.servers.fake_gpus")
    server.wait_loaded()
    yield server
    server.kill()


def test_pictures_and_numbers_at_once_are_each_answered_and_never_mixed(fake_server: Server) -> None:
    """The fake model answers a mixed batch with nonsense. Requests of one kind share batches."""
    server = fake_server
    assert server.get("/models/m/1").json()["gpu"]["pixels"] == "normalised on cuda:0"
    rng = np.random.default_rng(0)
    wrong: list[Any] = []
    together = threading.Barrier(24)
    before = server.metric("batches_total", model="m")

    def ask_often(number: int) -> None:
        together.wait()
        for pixels in drawn[number]:
            want = [expected(numbers(*pixels))[0]]
            if number % 2:
                body = {"inputs": {"x": numbers(*pixels).tolist()}}
                answer = server.post("/predict/m", json=body)
            else:
                headers = {"content-type": "image/png"}
                answer = server.post("/predict/m", content=picture(*pixels), headers=headers)
            if answer.status_code != 200 or answer.json()["outputs"]["sum"] != want:
                wrong.append((number, answer.text, want))

    drawn = rng.integers(1, 256, (24, 10, 4)).tolist()
    threads = [threading.Thread(target=ask_often, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert server.metric("batches_total", model="m") - before < 240 / 2


def test_only_pictures_are_treated_as_pixels(fake_server: Server) -> None:
    """Integers of 8 bits that a client sends are numbers, or are refused, as without a GPU."""
    server = fake_server
    small = np.array([[[1, 2], [3, 4]]], np.uint8)
    file = io.BytesIO()
    np.save(file, small)
    npy = server.post("/predict/m", content=file.getvalue(), headers={"content-type": "application/x-npy"})
    assert npy.json()["outputs"]["sum"] == expected(small).tolist()
    for shape in ([1, 2, 2], [1, 2, 2, 1]):
        tensor = {"name": "x", "datatype": "UINT8", "shape": shape, "data": [1, 2, 3, 4]}
        refused = server.post("/v2/models/m/infer", json={"inputs": [tensor]})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_input")
    file = io.BytesIO()
    np.save(file, small[..., np.newaxis])
    for files in ({"x": file.getvalue()}, {"y": picture(1, 2, 3, 4)}):
        form = server.post("/predict/m", files=files)
        if "x" in files:
            assert (form.status_code, form.json()["code"]) == (422, "invalid_input")
        else:
            assert form.json()["outputs"]["sum"] == expected(numbers(1, 2, 3, 4)).tolist()
