"""A single model in a folder has the name that the server was started with, and its own one as an alias."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.repository.layout import name_single, scan

SUFFIXES = {".onnx": "onnx"}


@pytest.mark.parametrize(
    ("file", "own"), [("model.onnx", "model"), ("1/model.onnx", "models"), ("iris/2/model.onnx", "iris")]
)
def test_every_layout_of_a_single_model(tmp_path: Path, file: str, own: str) -> None:
    path = tmp_path / "models" / file
    path.parent.mkdir(parents=True)
    path.touch()
    found = scan(tmp_path / "models", SUFFIXES)
    assert name_single(found, None, None) == found
    assert name_single(found, own, None) == found
    [model] = name_single(found, "service", None)
    assert (model.name, model.aliases, model.files) == ("service", (own,), found[0].files)


def test_several_models_keep_their_names(tmp_path: Path) -> None:
    """Unless one was there first: its name does not change when others come."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").touch()
    found = scan(tmp_path, SUFFIXES)
    assert name_single(found, "service", None) == found
    assert [model.name for model in name_single(found, "service", "b")] == ["a", "service"]
