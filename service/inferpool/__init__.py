"""Inferpool: a model server for exported ONNX and TorchScript models."""

from importlib import import_module

__version__ = "0.1.0"

_CLIENT = ("AsyncClient", "Client", "Prediction")


def __getattr__(name: str) -> object:
    """Import the client when it is first asked for: the server does not need its packages."""
    if name in _CLIENT:
        return getattr(import_module("inferpool.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
