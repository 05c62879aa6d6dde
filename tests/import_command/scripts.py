"""Runs the scripts of `release/importers` in this process: their packages take seconds to import."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
from inferpool.release import importers


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(importers.__file__).parent))
    return importlib.import_module(name)


def difference(out: Path) -> float:
    """The largest difference of ONNX Runtime's answers from those of the framework."""
    session = onnxruntime.InferenceSession(out / "model.onnx")
    with np.load(out / "imported.npz") as loaded:
        rows = {name[3:]: loaded[name] for name in loaded.files if name.startswith("in:")}
        expected = {name[4:]: loaded[name] for name in loaded.files if name.startswith("out:")}
    answers = session.run(list(expected), {
        name: array.astype(object) if array.dtype.kind == "U" else array for name, array in rows.items()
    })  # fmt: skip
    return max(float(np.abs(a - b).max()) for a, b in zip(answers, expected.values(), strict=True))
