"""Inferpool: a model server for exported ONNX and TorchScript models."""

__version__ = "0.1.0"
