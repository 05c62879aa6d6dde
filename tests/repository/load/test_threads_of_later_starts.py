"""A later start loads a model once, with the threads that the first start has chosen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from inferpool.backends.base import LoadOptions
from inferpool.backends.onnx.model import open_cpu_session
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository.config import ModelConfig
from inferpool.repository.load.loader import Loader
from inferpool.settings import Settings

from tests.onnx_models import write_identity
from tests.repository.load.test_load_files import Nobody


def test_a_later_start_loads_a_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads belongs to a session, and to make a large one takes seconds."""
    threads: list[int] = []

    def note(file: Path, options: LoadOptions) -> Any:
        threads.append(options.threads)
        return open_cpu_session(file, options)

    monkeypatch.setattr("inferpool.backends.onnx.backend.open_cpu_session", note)
    file = write_identity(tmp_path / "models", "m", ["FP32"], ("rows", 4))

    def start(cores: int, cache: str = "cache") -> list[int]:
        threads.clear()
        settings = Settings(measure_ms=0, devices=("cpu",), threads=cores, cache_dir=tmp_path / cache)
        loader = Loader(settings, Nobody(), Metrics({}), time.monotonic)  # type: ignore[arg-type]
        loaded = loader.load(VersionKey("m", 1), file, file.parent.parent, ModelConfig())
        try:
            assert loaded.view.threads == cores
        finally:
            loaded.pool.drain(10)
            loaded.close()
        return list(threads)

    assert start(2)[0] == 1
    assert start(2) == [2]
    assert start(3)[0] == 1
    assert start(3) == [3]
    # A guess without its plan is put right: what is measured has one thread.
    for plan in (tmp_path / "cache").glob("*.json"):
        plan.unlink()
    assert start(2)[:2] == [2, 1]
