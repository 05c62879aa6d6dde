"""Versions on GPUs, with a fake driver and a fake backend: loading, measuring, `/models`, refusals."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository.catalog import FAILED, READY
from inferpool.repository.repository import Repository
from inferpool.settings import Settings
from inferpool.system.gpus import cuda_driver

from tests.conftest import Serve
from tests.fake_gpu import FakeBackend, FakeCard, FakeDriver, expected
from tests.pool.bench import Outbox
from tests.server import PATCHES, ROOT, Server

FAKE = ROOT / "tests" / "fake_gpu"
KEY = VersionKey("m", 1)
NO_DRIVER = "no NVIDIA driver was found"
has_driver = cuda_driver().unavailable_reason() is None
without_driver = pytest.mark.skipif(has_driver, reason="this machine has an NVIDIA driver")


Load = Callable[..., Repository]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load a fake model: `load(config="…", driver=…, devices=…)`; its pools are drained after the test."""
    monkeypatch.syspath_prepend(str(FAKE))
    FakeBackend.reset()
    made: list[Repository] = []

    def start(config: str = "", driver: FakeDriver | None = None, **settings: Any) -> Repository:
        folder = tmp_path / "repository" / "m"
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / "1" / "model.fakegpu").touch()
        (folder / "model.toml").write_text(config)
        chosen = Settings(cache_dir=tmp_path / "cache", measure_ms=0, **settings)
        outbox = Outbox()
        repository = Repository(
            folder.parent, chosen, outbox, Metrics({}), time.monotonic, driver or FakeDriver()
        )
        repository.load_now()
        made.append(repository)
        return repository

    yield start
    for repository in made:
        assert repository.drain(10)


def view(repository: Repository) -> Any:
    return repository.models()["m"].versions[1]


def test_every_gpu_gets_two_instances_with_a_copy_each(load: Load) -> None:
    """One instance copies while the other runs. The copy for checks and measurements is closed."""
    repository = load()
    assert view(repository).state == READY, view(repository).reason
    devices = [instance.device for instance in repository.live(KEY).instances]
    assert devices == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert sum(not model.closed for model in FakeBackend.loaded) == 4
    assert {model.options.device for model in FakeBackend.loaded if not model.closed} == {"cuda:0", "cuda:1"}
    repository.drain(10)
    repository.loaded(KEY).close()
    assert all(model.closed for model in FakeBackend.loaded)


def test_model_toml_overrides_the_devices_of_the_server(load: Load) -> None:
    repository = load('[instances]\ndevices = ["cuda:1"]\ncount = 3', devices=("cpu",))
    assert [instance.device for instance in repository.live(KEY).instances] == ["cuda:1"] * 3


def test_the_largest_bucket_is_halved_at_load_if_memory_is_short(load: Load) -> None:
    """The version serves with the buckets that fit."""
    FakeBackend.cards = {"cuda:0": FakeCard(room_rows=20), "cuda:1": FakeCard()}
    repository = load()
    assert view(repository).state == READY, view(repository).reason
    assert repository.live(KEY).buckets == (1, 2, 4, 8, 16)
    assert max(len(batch) for batch in FakeBackend.cards["cuda:1"].batches) <= 32


def test_a_model_whose_answers_depend_on_padding_is_not_padded(load: Load) -> None:
    FakeBackend.leaks = True
    repository = load()
    assert view(repository).state == READY
    assert repository.live(KEY).buckets == ()
    assert 'output "sum" differs' in view(repository).gpu.padding


def test_a_version_fails_with_a_reason_if_there_is_no_memory_for_a_single_row(load: Load) -> None:
    FakeBackend.cards = {"cuda:0": FakeCard(), "cuda:1": FakeCard(room_rows=0)}
    repository = load()
    assert view(repository).state == FAILED
    assert view(repository).reason.startswith("cuda:1 has no memory for a single row")
    assert all(model.closed for model in FakeBackend.loaded)


def test_the_change_that_tf32_makes_is_measured_and_shown(load: Load) -> None:
    plain = view(load()).gpu
    assert (plain.precision, plain.difference) == ("as the model says", None)
    FakeBackend.loaded.clear()
    repository = load("[gpu]\ntf32 = true")
    assert view(repository).gpu.precision == (
        "TF32; its outputs differ from those of FP32 by 0.0001 of their scale at the most"
    )
    serving = [model.options.gpu.tf32 for model in FakeBackend.loaded if not model.closed]
    assert serving == [True] * 4


def test_graphs_are_captured_by_each_instance_before_it_is_ready(load: Load) -> None:
    """Every bucket is captured, the largest first, on the instance's thread. Other copies capture none."""
    FakeBackend.captures = "well"
    repository = load()
    assert view(repository).gpu.graphs.ok
    serving = [model for model in FakeBackend.loaded if not model.closed]
    assert [[rows for _, rows in model.captured] for model in serving] == [[32, 16, 8, 4, 2, 1]] * 4
    threads = [{thread for thread, _ in model.captured} for model in serving]
    assert len(set().union(*threads)) == 4
    assert [model.captured for model in FakeBackend.loaded if model.closed] == [[]]


def test_graphs_that_answer_wrongly_are_given_up_with_a_reason(load: Load) -> None:
    FakeBackend.captures = "wrong"
    repository = load()
    assert view(repository).state == READY
    assert 'output "sum" differs' in view(repository).gpu.graphs.reason
    assert view(repository).gpu.graphs.reason.endswith("when a run of 32 rows is replayed")


def test_graphs_can_be_turned_off(load: Load) -> None:
    FakeBackend.captures = "well"
    repository = load("[gpu]\ngraphs = false")
    assert view(repository).gpu.graphs.reason == "its runtime has none here"
    assert not any(model.options.gpu.graphs or model.captured for model in FakeBackend.loaded)


def test_the_change_that_fp16_makes_is_measured_on_made_up_rows_and_on_samples(
    load: Load, tmp_path: Path
) -> None:
    """The copy in FP32 is closed before others load. Batching is checked within the rounding of FP16."""
    samples = tmp_path / "repository" / "m" / "samples"
    samples.mkdir(parents=True)
    (samples / "large.json").write_text(
        json.dumps({"inputs": {"x": [[1000, 0, 0, 0]]}, "outputs": {"sum": [3001]}, "tolerance": 0.01})
    )
    repository = load("[gpu]\nfp16 = true")
    shown = view(repository)
    assert shown.state == READY, shown.reason
    assert shown.gpu.precision == (
        "FP16; its outputs differ from those of FP32 by 0.001 of their scale at the most"
    )
    assert shown.gpu.difference.rows == 9
    assert shown.gpu.difference.relative == pytest.approx(1e-3)
    assert shown.gpu.difference.absolute == pytest.approx(4.5, rel=0.4)
    assert shown.gpu.difference.changed == 0
    assert shown.batching.enabled
    assert [model.options.gpu.fp16 for model in FakeBackend.loaded] == [True, False, *[True] * 4]
    [kept] = {model.options.gpu.cache_dir for model in FakeBackend.loaded}
    assert kept is not None
    assert (kept.parent, kept.name[:2]) == (tmp_path / "cache", "m-")
    assert [model.options.gpu.fp16 for model in FakeBackend.loaded if not model.closed] == [True] * 4


def test_a_golden_sample_is_compared_with_the_model_as_it_serves(load: Load, tmp_path: Path) -> None:
    """The tolerance of the sample decides how much rounding passes."""
    samples = tmp_path / "repository" / "m" / "samples"
    samples.mkdir(parents=True)
    (samples / "strict.json").write_text(
        json.dumps({"inputs": {"x": [[1000, 0, 0, 0]]}, "outputs": {"sum": [3001]}})
    )
    assert view(load()).state == READY
    failed = view(load("[gpu]\nfp16 = true"))
    assert failed.state == FAILED
    assert 'sample strict.json: output "sum" differs by 3' in failed.reason


def test_fp16_that_loses_numbers_fails_the_version_and_says_so(load: Load) -> None:
    FakeBackend.largest = 2.0
    failed = view(load("[gpu]\nfp16 = true"))
    assert failed.state == FAILED
    assert re.fullmatch(
        r'in FP16 output "sum" is not finite in \d of 8 numbers that are finite in FP32 \(up to [\d.]+\);'
        r" FP16 ends at 65504, within the model too: set gpu.fp16 = false in model.toml",
        failed.reason,
    )
    assert all(model.closed for model in FakeBackend.loaded)


def test_without_memory_for_fp32_the_difference_is_reported_as_unknown(load: Load) -> None:
    FakeBackend.fails = lambda options: not options.gpu.fp16
    shown = view(load("[gpu]\nfp16 = true"))
    assert (shown.state, shown.gpu.difference) == (READY, None)
    assert shown.gpu.precision == (
        "FP16; how much that changes could not be measured: the fake card has no room for it"
    )


def test_fp16_has_no_effect_on_the_cpu(load: Load) -> None:
    repository = load("[gpu]\nfp16 = true", devices=("cpu",))
    assert view(repository).state == READY
    assert not any(model.options.gpu.fp16 for model in FakeBackend.loaded)


def test_auto_chooses_the_cpu_if_the_runtime_supports_no_gpu(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so if the machine has a GPU."""
    FakeBackend.lacks = "it was built without"
    repository = load()
    assert {instance.device for instance in repository.live(KEY).instances} == {"cpu"}
    assert view(repository).gpu is None
    assert "although there is a GPU: it was built without" in caplog.text


def test_a_model_unfit_for_gpus_runs_on_the_cpu_unless_a_gpu_is_named(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """With `auto` it is served from the CPU, as the log and `/models` say; with a GPU by name it fails."""
    FakeBackend.unfit = "2 nodes would run on the CPU"
    served = load()
    assert (view(served).state, view(served).gpu) == (READY, None)
    assert view(served).reason == "on the CPU, though there is a GPU: 2 nodes would run on the CPU"
    assert "is served on the CPU: 2 nodes would run on the CPU" in caplog.text
    assert {instance.device for instance in served.live(KEY).instances} == {"cpu"}
    refused = load(devices=("cuda:0",))
    assert (view(refused).state, view(refused).reason) == (FAILED, "2 nodes would run on the CPU")


# Through a real server.


@pytest.fixture
def fake_server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "repository" / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "model.fakegpu").touch()
    half = tmp_path / "repository" / "half" / "1"
    half.mkdir(parents=True)
    (half / "model.fakegpu").touch()
    (half.parent / "model.toml").write_text("[gpu]\nfp16 = true")
    server = Server(
        folder.parent.parent,
        environ={
            "PYTHONPATH": f"{ROOT}:{FAKE}:{PATCHES}",
            "INFERPOOL_CACHE_DIR": str(tmp_path / "cache"),
            "INFERPOOL_MEASURE_MS": "0",
        },
        module="tests.servers.fake_gpus",
    )
    server.wait_loaded()
    yield server
    server.kill()


def test_a_server_on_gpus_pads_batches_and_reports_it(fake_server: Server) -> None:
    """Three rows run as four, and the answer has three; `/models` and the metrics report the padding."""
    rows = [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]]
    answer = fake_server.post("/predict/m", json={"inputs": {"x": rows}})
    assert answer.json()["outputs"]["sum"] == expected(np.array(rows)).tolist()
    version = fake_server.get("/models/m/1").json()
    assert version["gpu"] == {
        "cpu_nodes": {},
        "batch_rows": [1, 2, 4, 8, 16, 32],
        "padding": "batches are rounded up with rows of zeros, which changes no answer (tried on every size)",
        "precision": "as the model says",
        "difference": None,
        "graphs": "its runtime has none here",
        "pixels": None,
        "tensorrt": None,
    }
    assert [item["device"] for item in version["instances"]] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert fake_server.metric("padded_rows_total", model="m", version="1") == 1
    assert fake_server.metric("cpu_nodes", model="m", version="1") == 0
    for device, used in (("cuda:0", 1000), ("cuda:1", 1001)):
        assert fake_server.metric("gpu_utilization_ratio", device=device) == 0.75
        assert fake_server.metric("gpu_memory_used_bytes", device=device) == used
        assert fake_server.metric("gpu_memory_total_bytes", device=device) == 2**34
        assert fake_server.metric("gpu_temperature_celsius", device=device) == 41
        assert fake_server.metric("gpu_power_watts", device=device) == pytest.approx(123.4)
        assert fake_server.metric("gpu_energy_joules_total", device=device) == pytest.approx(5.6)
    half = fake_server.get("/models/half/1").json()["gpu"]
    assert half["precision"].startswith("FP16; its outputs differ from those of FP32 by 0.001 of their scale")
    # Made-up rows have numbers of the normal distribution; the model answers three times their sum.
    assert 1e-3 < half["difference"].pop("absolute") < 0.1
    assert half["difference"] == {"relative": pytest.approx(1e-3), "changed": 0.0, "rows": 8}
    config = fake_server.get("/v2/models/m/config").json()
    assert {(group["kind"], tuple(group["gpus"])) for group in config["instance_group"]} == {
        ("KIND_GPU", (0,)),
        ("KIND_GPU", (1,)),
    }


@without_driver
@pytest.mark.parametrize(("model", "missing"), [("digits", "is built for CPUs only"), ("fake", NO_DRIVER)])
def test_a_version_fails_if_the_gpu_that_was_asked_for_is_missing(
    model: str, missing: str, serve: Serve, tmp_path: Path
) -> None:
    """The CPU does not step in. The reason says what is missing, and other models serve."""
    repository = tmp_path / "repository"
    on_cpu = repository / "neighbour"
    (on_cpu / "1").mkdir(parents=True)
    source = ROOT / "models" / "digits" / "1" / "model.onnx"
    (on_cpu / "1" / "model.onnx").write_bytes(source.read_bytes())
    (on_cpu / "model.toml").write_text('[instances]\ndevices = ["cpu"]')
    on_gpu = repository / "wanted" / "1"
    on_gpu.mkdir(parents=True)
    if model == "digits":
        (on_gpu / "model.onnx").write_bytes(source.read_bytes())
    else:
        (on_gpu / "model.fakegpu").touch()
    server = serve(repository, "--devices", "cuda:0", PYTHONPATH=f"{ROOT}:{FAKE}")
    version = server.get("/models/wanted/1").json()
    assert (version["state"], version["instances"]) == ("failed", [])
    assert version["reason"].startswith("the model is configured for cuda:0, but ")
    assert missing in version["reason"]
    assert server.get("/models/neighbour/1").json()["instances"][0]["device"] == "cpu"
    assert server.post("/predict/wanted", json={"inputs": [[0, 0, 0, 0]]}).status_code == 503
