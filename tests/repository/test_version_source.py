"""What a version was loaded from, as an engine leaves it to its successor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inferpool.backends.registry import backends_by_suffix
from inferpool.repository.config import read_config
from inferpool.repository.layout import scan
from inferpool.repository.version_source import VersionSource, held_from_json, held_json, read_source

CONFIG = """
[text]
[labels]
top_k = 2
[batching]
max_rows = 7
[versions]
serve = [1]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a model with one version and labels."""
    model = tmp_path / "m"
    (model / "1").mkdir(parents=True)
    for name, content in {"1/model.onnx": "x", "labels.txt": "cat", "model.toml": CONFIG}.items():
        (model / name).write_text(content)
    return model


def source(folder: Path) -> VersionSource:
    (model,) = scan(folder.parent, backends_by_suffix())
    return read_source(model, 1, read_config(folder / "model.toml"))


def test_a_source_comes_back_from_json(folder: Path) -> None:
    before = source(folder)
    held = held_from_json(json.loads(json.dumps(held_json(before))))
    assert (held.config, held.files) == (before.config, before.files)
    # A table that is not there means something else than one with defaults: the model takes single texts.
    assert held.config.text is not None
    assert not held.config.text.scores.model_fields_set
    assert held.changed_file(source(folder)) is None


@pytest.mark.parametrize("name", ["labels.txt", "1/model.onnx", "1/weights.bin"])
def test_a_file_that_has_changed_come_or_gone_is_named(folder: Path, name: str) -> None:
    held = held_from_json(held_json(source(folder)))
    (folder / name).write_text("other")
    assert held.changed_file(source(folder)) == Path(name).name
    (folder / name).unlink()
    if name != "1/model.onnx":
        gone = held.changed_file(source(folder))
        assert gone == (None if name == "1/weights.bin" else Path(name).name)


def test_another_link_to_a_file_is_no_other_source(folder: Path) -> None:
    file = folder / "1" / "model.onnx"
    (folder.parent / "first").hardlink_to(file)
    before = source(folder)
    (folder.parent / "second").hardlink_to(file)
    assert source(folder) == before
