"""A whole version of an ONNX model on a card that is fake: loaded, proven, captured, served and unloaded.

ONNX Runtime's CPU session computes, from and to the memory of the fake library; all else is as on a card.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest
from inferpool.backends.base import DeviceModel, GpuOptions, LoadOptions, TensorRTPlan
from inferpool.backends.cuda.memory import CudaMemory
from inferpool.backends.onnx.gpu import loading
from inferpool.backends.onnx.gpu import session as gpu_session
from inferpool.backends.registry import find_backend
from inferpool.errors import LoadError
from inferpool.observe.metrics import Metrics
from inferpool.pixel_table import Normalisation
from inferpool.pool.ports import Entry, VersionKey
from inferpool.repository.catalog import READY
from inferpool.repository.repository import Repository
from inferpool.settings import Settings
from onnx import TensorProto, helper
from PIL import Image

from tests.backends.cuda.test_memory import library, opened  # noqa: F401 - fixtures
from tests.backends.onnx.gpu.test_cuda_graphs import GraphSession, value
from tests.fake_gpu import FakeDriver
from tests.pool.bench import Outbox

KEY = VersionKey("m", 1)
node = helper.make_node
real_session = ort.InferenceSession


class Binding:
    """A binding to the fake card's memory, which is the host's."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding

    def bind_input(self, name: str, device: str, index: int, *rest: Any) -> None:
        assert (device, index) == ("cuda", 3)
        self.binding.bind_input(name, "cpu", 0, *rest)

    def bind_output(self, name: str, device: str, index: int, *rest: Any) -> None:
        assert (device, index) == ("cuda", 3)
        self.binding.bind_output(name, "cpu", 0, *rest)

    def get_outputs(self) -> Any:
        return self.binding.get_outputs()


class Session(GraphSession):
    """`InferenceSession` on CUDA, made up; a test says whether it refuses graphs or breaks in a capture."""

    made: ClassVar[list[Session]] = []
    refuses: ClassVar[str] = ""
    breaks: ClassVar[str] = ""
    takes: ClassVar[list[str]] = []
    blind: ClassVar[str] = ""

    def __init__(self, file: str | bytes, settings: Any, providers: Any, enable_fallback: int) -> None:
        assert not enable_fallback
        self.providers = [name for name, _ in providers]
        *_, (_, options) = providers
        assert all(chosen["user_compute_stream"] == options["user_compute_stream"] for _, chosen in providers)
        self.graphed = options["enable_cuda_graph"] == "1"
        self.normalises = isinstance(file, bytes)
        if self.blind and self.normalises:
            raise RuntimeError(self.blind)
        if self.graphed and self.refuses:
            raise RuntimeError(self.refuses)
        assert settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        self.stream = int(options["user_compute_stream"])
        super().__init__(
            real_session(file, settings, providers=["CPUExecutionProvider"]),
            Memories.by_stream[self.stream],
            self.breaks,
        )
        self.made.append(self)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert self.graphed or options.get_run_config_entry("gpu_graph_id") == "-1"
        super().run_with_iobinding(binding.binding, options)

    def io_binding(self) -> Any:
        return Binding(super().io_binding())

    def get_providers(self) -> list[str]:
        return [*self.providers, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=name) for name in self.takes or self.providers]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


class Memories:
    """The memories that were made, by the streams that they gave out."""

    by_stream: ClassVar[dict[int, Any]] = {}


Load = Callable[..., Repository]


@pytest.fixture
def load(
    opened: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Load]:
    """Load a model of these nodes as `m`; whatever it took on the card is given back in the end."""
    Session.made, Session.refuses, Session.breaks, Session.takes, Session.blind = [], "", "", [], ""
    Memories.by_stream = {}
    driver = FakeDriver(4)
    monkeypatch.setattr(gpu_session, "cuda_driver", lambda: driver)
    monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(gpu_session, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    make_memory = CudaMemory

    def memory(index: int, cuda: int) -> Any:
        made = make_memory(index, cuda)
        Memories.by_stream[made.stream] = made
        return made

    monkeypatch.setattr(gpu_session, "CudaMemory", memory)
    repositories: list[Repository] = []

    def start(nodes: list[Any], inputs: list[Any], outputs: list[Any], config: str = "") -> Repository:
        folder = tmp_path / "repository" / "m"
        (folder / "1").mkdir(parents=True)
        graph = helper.make_graph(nodes, "g", inputs, outputs)
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
        (folder / "1" / "model.onnx").write_bytes(model.SerializeToString())
        (folder / "model.toml").write_text(f'[instances]\ndevices = ["cuda:3"]\ncount = 1\n{config}')
        settings = Settings(cache_dir=tmp_path / "cache", measure_ms=0)
        made = Repository(folder.parent, settings, Outbox(), Metrics({}), time.monotonic, driver)
        made.load_now()
        repositories.append(made)
        return made

    yield start
    for repository in repositories:
        assert repository.drain(10)
        repository.close()
    for made in Memories.by_stream.values():
        assert made._library.fakeLeft() == 0


def ask(repository: Repository, rows: Any) -> Any:
    """The version's answer to `rows`, through its queue."""
    pool = repository.loaded(KEY).pool
    pool.offer(Entry(1, KEY, {"a": rows}, len(rows), "a", rows.nbytes, time.monotonic()))
    outbox: Any = pool._outbox
    [result] = outbox.take(1).values()
    assert result.outputs is not None, result.error
    return result.outputs["y"]


SQUARE = [node("Mul", ["a", "a"], ["y"])], [value("a", ["n", 3])], [value("y", ["n", 3])]


def check(repository: Repository) -> None:
    for count in (1, 3, 30, 8, 1, 70):
        rows = np.random.default_rng(count).random((count, 3)).astype(np.float32)
        assert ask(repository, rows).tolist() == (rows * rows).tolist()


def test_each_instance_captures_on_its_own_thread(load: Load) -> None:
    repository = load(*SQUARE)
    view: Any = repository.models()["m"].versions[1]
    assert view.state == READY, view.reason
    assert view.gpu.graphs.ok
    measured, serving = Session.made
    assert (measured.graphed, serving.graphed) == (True, True)
    assert len(serving.graphs) == len(repository.live(KEY).buckets)
    serving.runs.clear()
    check(repository)
    assert {kind for kind, _ in serving.runs} == {"replayed"}
    assert not any(serving.synchronous)


@pytest.mark.parametrize(
    ("refuses", "breaks", "reason"),
    [
        ("cannot use the graph capture feature: control flow nodes", "", "the model has control flow"),
        ("", "refuses", "a run could not be captured: CUDA failure 900"),
        ("", "stale", 'output "y" differs'),
    ],
)
def test_a_version_without_graphs_is_served(refuses: str, breaks: str, reason: str, load: Load) -> None:
    """By a session that was opened without, in the same stream."""
    Session.refuses, Session.breaks = refuses, breaks
    repository = load(*SQUARE)
    view: Any = repository.models()["m"].versions[1]
    assert view.state == READY, view.reason
    assert reason in view.gpu.graphs.reason
    serving = Session.made[-1]
    assert not serving.graphed
    serving.runs.clear()
    check(repository)
    assert {kind for kind, _ in serving.runs} == {"plain"}


def test_a_hopeless_capture_is_not_tried(load: Load) -> None:
    places = [value("y", [2, "k"], TensorProto.INT64)]
    repository = load([node("NonZero", ["a"], ["y"])], [value("a", ["n", "m"])], places)
    view: Any = repository.models()["m"].versions[1]
    assert view.state == READY, view.reason
    assert view.gpu.graphs.reason == 'the shape of output "y" is not known before the run'
    assert not any(session.graphs for session in Session.made)


def test_graphs_can_be_turned_off_in_the_configuration(load: Load) -> None:
    repository = load(*SQUARE, config="[gpu]\ngraphs = false")
    view: Any = repository.models()["m"].versions[1]
    assert view.gpu.graphs.reason == "none were asked for"
    assert not any(session.graphed for session in Session.made)
    check(repository)


def test_a_model_of_one_shape_is_captured_too(load: Load) -> None:
    """It has no buckets, because no rows can be added to its batches."""
    repository = load([node("Mul", ["a", "a"], ["y"])], [value("a", [1, 3])], [value("y", [1, 3])])
    view: Any = repository.models()["m"].versions[1]
    assert view.gpu.graphs.ok
    serving = Session.made[-1]
    serving.runs.clear()
    rows = np.ones((1, 3), np.float32) * 5
    assert ask(repository, rows).tolist() == [[25, 25, 25]]
    assert serving.runs == [("replayed", 1)]


PICTURES = [node("Mul", ["a", "a"], ["y"])], [value("a", ["n", 3, 4, 5])], [value("y", ["n", 3, 4, 5])]
NORMALISED = "[image]\nmean = [0.4, 0.5, 0.6]\nstd = [0.2, 0.3, 0.4]\n"


def pictures(count: int) -> tuple[Any, Any]:
    """Of four by five pixels; as such, and as the numbers that a model gets of them."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 4, 5, 3), np.uint8)
    scaled = (pixels * (1 / 255) - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    return pixels, np.moveaxis(scaled, -1, 1).astype(np.float32)


def check_pictures(repository: Repository) -> None:
    for count in (1, 3, 30, 8, 1, 70):
        pixels, rows = pictures(count)
        for given in (pixels, rows):
            assert ask(repository, given).tolist() == (rows * rows).tolist()


def test_pixels_are_normalised_in_the_stream_of_graphs_that_are_replayed(load: Load) -> None:
    """By a session beside the model's, of which every node has to run on the card, too."""
    repository = load(*PICTURES, config=NORMALISED)
    view: Any = repository.models()["m"].versions[1]
    assert view.state == READY, view.reason
    assert (view.gpu.graphs.ok, view.gpu.pixels) == (True, "normalised on cuda:3")
    _, serving, lookup = Session.made
    assert [session.normalises for session in Session.made] == [False, False, True]
    assert (serving.graphed, lookup.graphed) == (True, False)
    assert serving.stream == lookup.stream
    serving.runs.clear()
    check_pictures(repository)
    pixels, rows = pictures(1)
    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    [left] = view.image.decode(file.getvalue()).values()
    assert left.tolist() == pixels.tolist()
    assert ask(repository, left).tolist() == (rows * rows).tolist()
    assert {kind for kind, _ in serving.runs} == {"replayed"}
    assert not any(lookup.synchronous)


def test_pixels_of_an_fp16_model_are_normalised_in_the_inputs_datatype(load: Load) -> None:
    """Its input stays FP32, and so do the numbers that pixels become."""
    repository = load(*PICTURES, config=f"{NORMALISED}[gpu]\nfp16 = true\n")
    view: Any = repository.models()["m"].versions[1]
    assert view.state == READY, view.reason
    assert view.gpu.pixels == "normalised on cuda:3"
    pixels, rows = pictures(5)
    assert ask(repository, pixels).tolist() == ask(repository, rows).tolist()


@pytest.mark.parametrize("broken", ["", "refuses"])
def test_pixels_are_normalised_for_a_model_without_graphs(broken: str, load: Load) -> None:
    """Also where a capture that failed took its session with it."""
    Session.breaks = broken
    repository = load(*PICTURES, config=NORMALISED + ("" if broken else "[gpu]\ngraphs = false\n"))
    view: Any = repository.models()["m"].versions[1]
    assert view.gpu.pixels == "normalised on cuda:3"
    assert not view.gpu.graphs.ok
    check_pictures(repository)


def test_a_gpu_that_cannot_normalise_gets_numbers(load: Load) -> None:
    Session.blind = "CUDA failure 2: out of memory"
    repository = load(*PICTURES, config=NORMALISED)
    view: Any = repository.models()["m"].versions[1]
    assert view.state == READY, view.reason
    assert view.gpu.pixels == (
        "normalised on the CPU: cuda:3 has no memory for the model: CUDA failure 2: out of memory"
    )
    assert view.image.pixel_spec is None
    rows = pictures(3)[1]
    assert ask(repository, rows).tolist() == (rows * rows).tolist()


def test_a_failed_load_frees_its_gpu_memory(load: Load) -> None:
    """Here it is no tensor of numbers that the model takes."""
    kind = TensorProto.STRING
    repository = load([node("Identity", ["a"], ["y"])], [value("a", ["n"], kind)], [value("y", ["n"], kind)])
    assert repository.models()["m"].versions[1].reason.startswith("a GPU takes tensors of numbers only")
    assert Memories.by_stream


def test_a_tensorrt_plan_runs_in_the_same_stream_with_cuda_as_fallback(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is none where TensorRT takes no node."""
    load(*SQUARE)
    file = tmp_path / "repository" / "m" / "1" / "model.onnx"
    monkeypatch.setattr(loading, "tensorrt_unavailable_reason", lambda: None)
    engine = TensorRTPlan(tmp_path, (("a", (8, 3)),))
    model = find_backend("onnx").load(file, LoadOptions("cuda:3", gpu=GpuOptions(tensorrt=engine)))
    rows = np.ones((2, 3), np.float32) * 3
    assert isinstance(model, DeviceModel)
    assert model.run_padded([{"a": rows}], 8)["y"].tolist() == (rows * rows).tolist()
    assert Session.made[-1].providers == ["TensorrtExecutionProvider", gpu_session.CUDA]
    assert Session.made[-1].synchronous == [False]
    model.close()
    for_pixels = Normalisation("a", "HW", 1, 3, np.arange(256, dtype=np.float32).reshape(1, 256))
    model = find_backend("onnx").load(
        file, LoadOptions("cuda:3", gpu=GpuOptions(tensorrt=engine, normalisation=for_pixels))
    )
    assert isinstance(model, DeviceModel)
    assert Session.made[-1].providers == [gpu_session.CUDA]
    model.close()
    Session.takes = [gpu_session.CUDA]
    with pytest.raises(LoadError, match="TensorRT takes none of the model's nodes"):
        find_backend("onnx").load(file, LoadOptions("cuda:3", gpu=GpuOptions(tensorrt=engine)))
    monkeypatch.setattr(loading, "tensorrt_unavailable_reason", lambda: "there is none")
    with pytest.raises(LoadError, match="there is none"):
        find_backend("onnx").load(file, LoadOptions("cuda:3", gpu=GpuOptions(tensorrt=engine)))
