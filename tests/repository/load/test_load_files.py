"""The bytes that were checked are the bytes that are loaded, whatever becomes of the files meanwhile."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inferpool.backends.base import Backend, LoadedModel, LoadOptions
from inferpool.cli import main
from inferpool.errors import LoadError
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import VersionKey
from inferpool.repository.config import ModelConfig
from inferpool.repository.lifecycle import LOAD, Phase
from inferpool.repository.load.load_files import open_files
from inferpool.repository.load.loader import Loader
from inferpool.settings import Settings

from tests.onnx_models import add_external, save


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of temporary files, in which nothing is left at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


class CodeBackend(Backend):
    """A backend whose files can run code."""

    name = "code"
    suffixes = (".code",)
    runs_code = True

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        raise NotImplementedError

    def describe(self) -> str:
        return "code 1"


class Nobody:
    """An outbox to which nothing is sent."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def write_external(model: Path, number: float) -> Path:
    """Version 1 of a model that adds the numbers in its external data to its input."""
    file = save(add_external("weights.bin"), model / "1")
    write_weights(model, number)
    return file


def write_weights(model: Path, number: float) -> None:
    (model / "1" / "weights.bin").write_bytes(np.full(4, number, np.float32).tobytes())


@pytest.mark.parametrize("in_place", [True, False], ids=["written over", "exchanged"])
def test_a_file_that_is_exchanged_between_its_check_and_its_load_is_not_loaded(
    tmp_path: Path, in_place: bool
) -> None:
    model = tmp_path / "m"
    file = write_external(model, 1.0)
    assert not main(["sign", str(model)])
    loader = Loader(
        Settings(measure_ms=0, devices=("cpu",)), Nobody(), Metrics({}), time.monotonic  # type: ignore[arg-type]
    )  # fmt: skip

    def exchange(phase: Phase) -> None:
        if phase == LOAD:
            if not in_place:
                (model / "1" / "weights.bin").unlink()
                file.unlink()
            write_weights(model, 1000.0)
            file.write_bytes(b"no model")

    loaded = loader.load(VersionKey("m", 1), file, model, ModelConfig(), exchange)
    try:
        outputs: Any = loaded.copies.models[0][1].run({"x": np.zeros((1, 4), np.float32)})
        assert outputs["y"].tolist() == [[1.0] * 4]
    finally:
        loaded.pool.drain(10)
        loaded.close()
    with pytest.raises(LoadError, match=r"model\.onnx has changed since the version was signed"):
        loader.load(VersionKey("m", 1), file, model, ModelConfig())


def test_a_file_that_runs_code_by_its_digest_is_loaded_from_a_copy(tmp_path: Path) -> None:
    file = tmp_path / "m" / "1" / "model.code"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"good")
    good = "770e607624d689265ca6c44884d0807d9b054d23c473c106c72be9de08b7376c"
    config = ModelConfig(sha256=("0" * 64, good.upper()))
    files = open_files(file, file.parent.parent, config, CodeBackend(), Settings())
    file.write_bytes(b"evil")
    assert files.trusted
    assert files.file.read_bytes() == b"good"
    assert files.file.name == "model.code"
    files.close()
    files = open_files(file, file.parent.parent, config, CodeBackend(), Settings())
    assert (files.file, files.trusted) == (file, False)
    files.close()


def test_other_files_are_read_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "m" / "1" / "model.code"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"good")
    for config, settings in (
        (ModelConfig(), Settings()),
        (ModelConfig(sha256=("0" * 64,)), Settings(trust=True)),
    ):
        files = open_files(file, file.parent.parent, config, CodeBackend(), settings)
        assert (files.file, files.folder, files.trusted) == (file, file.parent.parent, settings.trust)
        files.close()


def test_a_digest_is_computed_once_and_is_that_of_the_signed_version(tmp_path: Path) -> None:
    model = tmp_path / "m"
    file = write_external(model, 1.0)
    plain = open_files(file, model, ModelConfig(), CodeBackend(), Settings())
    digest = plain.model_digest()
    write_weights(model, 2.0)
    assert plain.model_digest() == digest
    write_weights(model, 1.0)
    plain.close()
    assert not main(["sign", str(model)])
    signed = open_files(file, model, ModelConfig(), CodeBackend(), Settings())
    assert signed.model_digest() == digest, "a plan outlives the signing of its model"
    signed.close()


def test_settings_that_are_exchanged_after_they_were_read_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "m"
    file = write_external(model, 1.0)
    (model / "model.toml").write_text("[batching]\nenabled = false\n")
    assert not main(["sign", str(model)])
    with pytest.raises(LoadError, match=r"model\.toml has changed since it was read"):
        open_files(file, model, ModelConfig(), CodeBackend(), Settings())
