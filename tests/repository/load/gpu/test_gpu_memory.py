"""GPU memory of a version is freed, however its load ends, and versions that serve are not disturbed.

The fake library counts every block and stream; ONNX Runtime runs on the CPU, in that library's memory.
"""

from __future__ import annotations

import ctypes
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from inferpool.backends.base import LoadOptions
from inferpool.backends.cuda.memory import CudaMemory
from inferpool.backends.onnx.gpu import loading, session
from inferpool.backends.onnx.gpu.bound_model import BoundModel
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import Entry, VersionKey
from inferpool.repository.catalog import FAILED, READY
from inferpool.repository.repository import Repository
from inferpool.settings import Settings

from tests.backends.cuda.test_memory import library, opened  # noqa: F401 - fixtures
from tests.fake_gpu import FakeBackend, FakeDriver, FakeModel, expected
from tests.pool.bench import Outbox
from tests.server import ROOT

DIGITS = ROOT / "models" / "digits" / "1" / "model.onnx"
ROOM = 1 << 22
Start = Callable[..., tuple[Repository, Outbox]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Make repositories of the folder `tmp_path/repository`; they are drained after the test."""
    made: list[Repository] = []

    def load(devices: tuple[str, ...] = ("cuda:3",), cards: int = 4, **settings: Any) -> Any:
        outbox = Outbox()
        chosen = Settings(cache_dir=tmp_path / "cache", devices=devices, **settings)
        driver = FakeDriver(cards)
        made.append(Repository(tmp_path / "repository", chosen, outbox, Metrics({}), time.monotonic, driver))
        return made[-1], outbox

    yield load
    for repository in made:
        assert repository.drain(10)


@pytest.fixture
def card(opened: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:  # noqa: F811
    """The fake CUDA library, in whose memory `digits` runs. It keeps no threads apart: one instance only."""
    folder = tmp_path / "repository" / "digits"
    (folder / "1").mkdir(parents=True)
    shutil.copy(DIGITS, folder / "1" / "model.onnx")
    (folder / "model.toml").write_text("[instances]\ncount = 1\n[gpu]\ngraphs = false\n")

    def open_session(file: Path, options: LoadOptions, settings: Any, stream: int) -> Any:
        return ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"]), {}

    def bound(
        session: Any, signature: Any, device: str, memory: Any, cpu_nodes: Any, **rest: Any
    ) -> BoundModel:
        return BoundModel(session, signature, "cpu", memory, cpu_nodes, **rest | {"streamed": False})

    monkeypatch.setattr(session, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(loading, "open_memory", lambda options: CudaMemory(3, 13))
    monkeypatch.setattr(loading, "open_session", open_session)
    monkeypatch.setattr(loading, "BoundModel", bound)
    fake = ctypes.CDLL("libcudart.so.13")
    fake.fakeRoom(ctypes.c_size_t(ROOM))
    return fake


def ask(repository: Repository, outbox: Outbox, key: VersionKey, number: int, rows: Any, name: str) -> Any:
    """The outputs of a version for one request, through its pool."""
    entry = Entry(number, key, {name: rows}, len(rows), rows.shape[1:], rows.nbytes, time.monotonic())
    repository.router.offer(entry)
    result = outbox.take(1)[number]
    assert result.error is None
    return result.outputs


def test_all_memory_is_freed_after_a_version_has_loaded_and_answered(start: Start, card: Any) -> None:
    repository, outbox = start(measure_ms=200)
    repository.load_now()
    key = VersionKey("digits", 1)
    view = repository.models()["digits"].versions[1]
    assert view.state == READY, view.reason
    assert card.fakeLeft() > 0
    assert view.signature is not None
    [name] = view.signature.inputs_by_name
    rng = np.random.default_rng(0)
    for number, count in enumerate((1, 7, 40, 3)):
        rows = rng.random((count, 1, 8, 8)).astype(np.float32)
        assert len(ask(repository, outbox, key, number, rows, name)["logits"]) == count
    assert repository.drain(10)
    repository.loaded(key).close()
    assert card.fakeLeft() == 0


@pytest.mark.parametrize("room", [0, 300, 3_000, 6_000, 12_000])
def test_with_little_memory_a_version_serves_small_batches_or_fails_and_frees_all(
    room: int, start: Start, card: Any
) -> None:
    """The memory is enough for nothing, for a part of the load, or for a few rows."""
    card.fakeRoom(ctypes.c_size_t(room))
    repository, _ = start(measure_ms=0)
    repository.load_now()
    view = repository.models()["digits"].versions[1]
    if view.state == READY:
        buckets = repository.live(VersionKey("digits", 1)).buckets
        assert 1 <= buckets[-1] < 32
        assert repository.drain(10)
        repository.loaded(VersionKey("digits", 1)).close()
    else:
        assert "memory" in view.reason
    assert (view.state == READY) == (room > 1_000)
    assert card.fakeLeft() == 0


class Stuck(FakeModel):
    """A model whose `close` raises after it has closed."""

    def close(self) -> None:
        super().close()
        raise RuntimeError("the driver is gone")


def two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write versions 1 and 2 of a fake model; version 2 loads first."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "fake_gpu"))
    FakeBackend.reset()
    for version in ("1", "2"):
        folder = tmp_path / "repository" / "m" / version
        folder.mkdir(parents=True)
        (folder / "model.fakegpu").touch()
    (tmp_path / "repository" / "m" / "model.toml").write_text("[gpu]\nfp16 = true")


@pytest.mark.parametrize("nth", range(6))
def test_a_version_that_finds_no_memory_does_not_disturb_one_that_serves(
    nth: int, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `nth` copy fails to load; the other version answers before, meanwhile and afterwards."""
    two_versions(tmp_path, monkeypatch)
    repository, outbox = start(("cuda:0", "cuda:1"), 2, measure_ms=0)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    asked: list[int] = []

    def answers() -> None:
        asked.append(len(asked))
        got = ask(repository, outbox, VersionKey("m", 2), asked[-1], rows, "x")
        np.testing.assert_allclose(got["sum"], expected(rows), rtol=2e-3)

    loads: list[LoadOptions] = []

    def fails(options: LoadOptions) -> bool:
        if repository.models()["m"].versions[2].state != READY:
            return False
        loads.append(options)
        answers()
        return len(loads) == nth + 1

    FakeBackend.fails = fails
    repository.load_now()
    answers()
    versions = repository.models()["m"].versions
    assert versions[2].state == READY
    # The second copy, in FP32, is only for a comparison: the version serves without it.
    assert versions[1].state == (READY if nth == 1 else FAILED)
    if nth != 1:
        assert versions[1].reason == "the fake card has no room for it"
        serving = [model for model in FakeBackend.loaded if not model.closed]
        assert len(serving) == 4
        assert serving == [model for model in FakeBackend.loaded[:6] if not model.closed]
    assert len(asked) == len(loads) + 1


def test_a_copy_that_fails_to_close_does_not_keep_others_open(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two_versions(tmp_path, monkeypatch)
    repository, _ = start(("cuda:0", "cuda:1"), 2, measure_ms=0)
    repository.load_now()
    loaded = repository.loaded(VersionKey("m", 2))
    assert repository.drain(10)
    [*models] = loaded.copies.owned
    models[-1].__class__ = Stuck
    loaded.close()
    assert all(isinstance(model, FakeModel) and model.closed for model in models)
    assert "could not be given back" in caplog.text


def test_measuring_that_fails_half_way_closes_the_copies_it_has_loaded(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three instances are asked for. Of the two further copies to measure, the second fails to load."""
    two_versions(tmp_path, monkeypatch)
    (tmp_path / "repository" / "m" / "model.toml").write_text(
        "[versions]\nserve = [1]\n[instances]\ncount = 3"
    )
    loads: list[LoadOptions] = []

    def third(options: LoadOptions) -> bool:
        loads.append(options)
        return len(loads) == 3

    FakeBackend.fails = third
    repository, _ = start(("cuda:0",), 1, measure_ms=200)
    repository.load_now()
    view = repository.models()["m"].versions[1]
    assert (view.state, len(loads)) == (FAILED, 3)
    assert len(FakeBackend.loaded) == 2
    assert all(model.closed for model in FakeBackend.loaded)
