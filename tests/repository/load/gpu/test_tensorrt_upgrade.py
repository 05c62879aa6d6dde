"""TensorRT engines: built in a process of their own while CUDA serves, and taken between two batches."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from inferpool.backends.base import GpuOptions, LoadOptions, TensorRTPlan
from inferpool.backends.onnx.gpu.tensorrt import tensorrt_options, tensorrt_unavailable_reason
from inferpool.backends.onnx.gpu.tensorrt_build import await_build, start_build
from inferpool.backends.registry import find_backend
from inferpool.errors import LoadError
from inferpool.observe.metrics import Metrics
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.hot_swap import HotSwapModel
from inferpool.pool.ports import Entry, VersionKey
from inferpool.repository.load.gpu.tensorrt_upgrade import tensorrt_shapes
from inferpool.repository.repository import Repository
from inferpool.settings import Settings
from inferpool.tensors import Signature, TensorSpec

from tests.fake_gpu import FakeBackend, FakeCard, FakeDriver, FakeModel, expected
from tests.pool.bench import Outbox
from tests.server import PATCHES, ROOT, Server

FAKE = ROOT / "tests" / "fake_gpu"
KEY = VersionKey("m", 1)
BUILDING = "a TensorRT plan is being built, and CUDA serves meanwhile"


class ServedVersion:
    """A repository with one fake model and an instance on each of `cards`."""

    def __init__(self, folder: Path, behaviour: str, cards: int) -> None:
        model = folder / "repository" / "m"
        (model / "1").mkdir(parents=True, exist_ok=True)
        (model / "1" / "model.fakegpu").write_text(behaviour)
        (model / "model.toml").write_text("[gpu]\ntensorrt = true\n[instances]\ncount = 1")
        self.outbox = Outbox()
        settings = Settings(cache_dir=folder / "cache", measure_ms=0)
        self.repository = Repository(
            model.parent, settings, self.outbox, Metrics({}), time.monotonic, FakeDriver(cards)
        )
        self.numbers = itertools.count()
        self.repository.load_now()

    @property
    def status(self) -> str | None:
        return self.repository.live(KEY).tensorrt

    def build(self) -> str | None:
        """Wait for the end of the upgrade and return its status."""
        assert self.repository.loaded(KEY).copies.await_upgrade(60)
        return self.status

    def ask(self, value: float) -> None:
        rows = np.full((1, 4), value, np.float32)
        number = next(self.numbers)
        entry = Entry(number, KEY, {"x": rows}, 1, "x", rows.nbytes, time.monotonic())
        self.repository.loaded(KEY).pool.offer(entry)
        [result] = self.outbox.take(1).values()
        assert result.outputs is not None, result.error
        assert result.outputs["sum"][0] == expected(rows)[0]

    def serving(self) -> list[FakeModel]:
        return [model for model in FakeBackend.loaded if not model.closed]


def children_that_build() -> list[str]:
    """The command lines of this process's children that build an engine."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids if Path(f"/proc/{pid}").exists()]
    return [line for line in lines if "tensorrt_build" in line]


Serve = Callable[..., ServedVersion]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serve a model; its file decides what happens when its engine is built."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FAKE}")
    FakeBackend.reset()
    FakeBackend.engines = True
    made: list[ServedVersion] = []

    def start(behaviour: str, cards: int = 1) -> ServedVersion:
        made.append(ServedVersion(tmp_path, behaviour, cards))
        return made[-1]

    yield start
    for one in made:
        assert one.repository.drain(10)
        one.repository.close()
    assert all(model.closed for model in FakeBackend.loaded)


def test_a_built_engine_takes_over_between_two_batches(served: Serve) -> None:
    """The model on CUDA answers until then, and is closed then. The answers are the same."""
    one = served("right")
    [before] = one.serving()
    one.ask(1)
    assert one.build() == "TensorRT serves"
    first, made = one.serving()
    assert (first, made.engine) == (before, "right")
    # Every batch size has run, so that no request waits for a first run.
    assert {len(batch) for batch in made.card.batches} >= {1, 2, 4, 8, 16, 32}
    one.ask(2)
    assert one.serving() == [made]
    one.ask(3)


def test_instances_on_two_cards_switch_together(served: Serve, tmp_path: Path) -> None:
    """Each card has a model of its own; cards of one kind share the files."""
    one = served("right", 2)
    assert one.build() == "TensorRT serves"
    made = [model for model in one.serving() if model.engine]
    assert [model.options.device for model in made] == ["cuda:0", "cuda:1"]
    assert len(list((tmp_path / "cache" / "tensorrt").iterdir())) == 1


def test_an_engine_is_kept_for_the_next_start(served: Serve, tmp_path: Path) -> None:
    """It is used again for the same model; another model has its own."""
    assert served("right").build() == "TensorRT serves"
    [folder] = (tmp_path / "cache" / "tensorrt").iterdir()
    kept = (folder / "engine").stat()
    assert served("right").build() == "TensorRT serves"
    assert (folder / "engine").stat() == kept
    assert served("other").build() == "TensorRT serves"
    assert len(list((tmp_path / "cache" / "tensorrt").iterdir())) == 2


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fails", "CUDA serves: TensorRT knows no operator like that"),
        ("crashes", "CUDA serves: the build process ended with status -9"),
        ("wrong", 'CUDA serves: output "sum" differs'),
    ],
)
def test_cuda_goes_on_serving_if_there_is_no_engine(
    behaviour: str, reason: str, served: Serve, tmp_path: Path
) -> None:
    """`/models` says why, and no file of the attempt is left."""
    one = served(behaviour)
    before = one.serving()
    status = one.build()
    assert status is not None
    assert status.startswith(reason)
    assert one.serving() == before
    one.ask(3)
    assert not list((tmp_path / "cache" / "tensorrt").glob("*.part"))


def test_while_an_engine_is_built_cuda_serves_and_can_be_unloaded(served: Serve) -> None:
    """A build that would never end is ended together with its version."""
    one = served("hangs")
    assert one.status == BUILDING
    for value in range(5):
        one.ask(value)
    copies = one.repository.loaded(KEY).copies
    assert one.repository.drain(10)
    copies.close()
    assert copies.await_upgrade(0)
    assert not children_that_build()


def test_a_backend_without_engines_says_so(served: Serve) -> None:
    FakeBackend.engines = False
    one = served("right")
    assert one.build() == "CUDA serves: the backend fakegpu does not use TensorRT"


def test_models_shows_the_status_through_a_real_server(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.fakegpu").write_text("right")
    (folder / "model.toml").write_text("[gpu]\ntensorrt = true")
    environ = {"PYTHONPATH": f"{ROOT}:{FAKE}:{PATCHES}", "INFERPOOL_CACHE_DIR": str(tmp_path / "cache")}
    server = Server(folder.parent, environ=environ, module="tests.servers.fake_gpus")
    try:
        server.wait_loaded()
        server.wait_for("no TensorRT: the backend fakegpu")
        told = server.get("/models/m/1").json()["gpu"]["tensorrt"]
        assert told == "CUDA serves: the backend fakegpu does not use TensorRT"
        answer = server.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]})
        assert answer.json()["outputs"]["sum"] == expected(np.array([[1, 2, 3, 4]])).tolist()
    finally:
        server.kill()


def test_a_build_ends_when_its_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed server leaves no process behind: the build ends when its stdin does."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{FAKE}")
    file = tmp_path / "model.fakegpu"
    file.write_text("hangs")
    process = start_build(
        "fakegpu", file, LoadOptions("cuda:0", gpu=GpuOptions(tensorrt=TensorRTPlan(tmp_path)))
    )
    assert process.stdin is not None
    process.stdin.close()
    with pytest.raises(LoadError, match="the build process ended with status 1"):
        await_build(process)


for_cpus = pytest.mark.skipif(
    "TensorrtExecutionProvider" in onnxruntime.get_available_providers(),
    reason="ONNX Runtime for GPUs is installed",
)


@for_cpus
def test_a_real_build_says_what_is_missing(tmp_path: Path) -> None:
    """The build runs in the real process, with the real backend."""
    file = ROOT / "models" / "digits" / "1" / "model.onnx"
    process = start_build(
        "onnx", file, LoadOptions("cuda:0", gpu=GpuOptions(tensorrt=TensorRTPlan(tmp_path)))
    )
    with pytest.raises(LoadError, match="was built without TensorRT"):
        await_build(process)


@for_cpus
def test_the_runtime_for_cpus_has_no_tensorrt() -> None:
    assert str(tensorrt_unavailable_reason()).endswith("was built without TensorRT")
    assert find_backend("onnx").tensorrt_unavailable_reason() == tensorrt_unavailable_reason()


def test_the_options_of_tensorrt_name_the_cache_and_the_largest_shapes() -> None:
    engine = TensorRTPlan(Path("/cache/e"), (("a", (32, 3, 8)), ("b", (32,))))
    told = tensorrt_options(LoadOptions("cuda:3"), engine, 4096, half=True)
    assert told == {
        "device_id": "3",
        "user_compute_stream": "4096",
        "trt_fp16_enable": "True",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "/cache/e",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": "/cache/e",
        "trt_profile_min_shapes": "a:1x3x8,b:1",
        "trt_profile_opt_shapes": "a:32x3x8,b:32",
        "trt_profile_max_shapes": "a:32x3x8,b:32",
    }
    fixed = tensorrt_options(LoadOptions("cuda:0"), TensorRTPlan(Path("/cache/e")), 1, half=False)
    assert fixed["trt_fp16_enable"] == "False"
    assert not [name for name in fixed if "profile" in name]


@pytest.mark.parametrize(
    ("spec", "sizes", "shapes"),
    [
        (TensorSpec("x", "FP32", (-1, 4)), [1, 8], (("x", (8, 4)),)),
        (TensorSpec("x", "FP32", (1, 4)), None, ()),
        (TensorSpec("x", "FP32", (-1, -1)), [1, 8], 'that of input "x" varies'),
        (TensorSpec("x", "FP32", (-1, 4)), None, 'that of input "x" varies'),
        (TensorSpec("x", "FP32", None), [1, 8], 'that of input "x" varies'),
        (TensorSpec("x", "FP32", (-1, 4), optional=True), [1, 8], '"x" may be left out'),
    ],
)
def test_the_shapes_of_an_engine_vary_in_rows_only(
    spec: TensorSpec, sizes: list[int] | None, shapes: Any
) -> None:
    signature = Signature((spec,), (TensorSpec("y", "FP32", (-1,)),))
    buckets = BatchBuckets(sizes) if sizes else None
    if isinstance(shapes, str):
        with pytest.raises(LoadError, match=shapes):
            tensorrt_shapes(signature, buckets)
    else:
        assert tensorrt_shapes(signature, buckets) == shapes


def test_a_request_without_rows_is_answered_as_before_the_switch() -> None:
    """An engine needs at least one row, so the answer of CUDA for no rows is kept."""
    first, second = FakeModel(FakeCard()), FakeModel(FakeCard())
    switch = HotSwapModel(first)
    nothing = np.zeros((0, 4), np.float32)
    switch.offer(second, first.run({"x": nothing}))
    first.close()
    assert switch.run({"x": nothing})["sum"].shape == (0,)
    assert switch.run({"x": nothing}, ["sum"])["sum"].shape == (0,)
    assert not second.card.batches
    first.closed = False
    switch.close()


def test_a_model_that_was_offered_and_never_ran_is_closed_too() -> None:
    first, second = FakeModel(FakeCard()), FakeModel(FakeCard())
    switch = HotSwapModel(first)
    switch.offer(second, None)
    switch.close()
    assert first.closed
    assert second.closed
