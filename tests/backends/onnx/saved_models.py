"""Models of ONNX that a test builds, as the backend loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend

from tests import onnx_models


def load(built: Any, folder: Path) -> LoadedModel:
    """Save a model in `folder` and load it; raises LoadError."""
    return OnnxBackend().load(onnx_models.save(built, folder), LoadOptions())
