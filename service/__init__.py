"""Inferpool: a model server for exported ONNX and TorchScript models."""

from pathlib import Path

from service.compiled import State, use

__version__ = "0.1.0"

HOT_PATH: State = use(Path(__file__).parent)
"""Whether the modules that every request goes through run compiled."""
