# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "keras>=3.12",
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxscript>=0.5",
#   "torch>=2.9",
# ]
# ///
"""Converts a model of Keras to ONNX by PyTorch: `.keras`, or a `.h5` with the whole model.

    keras_model.py MODEL.keras EXAMPLE.npz OUT

Keras' own export by PyTorch goes through TorchScript, which PyTorch has deprecated and which cannot write
some layers for any number of rows. PyTorch's present exporter can. Channels stay where the model has them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from conversion import find_scores, write_about
from keras_files import arguments, load_model, output_names, read_inputs
from torch_export import export_module


class Flat(torch.nn.Module):  # type: ignore[misc]  # torch is not read by mypy
    """A Keras model that takes its inputs one by one, and answers a tuple."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Any) -> Any:
        """Answer as the model does when it predicts."""
        called = arguments(self.model, dict(zip(self.names, inputs, strict=True)))
        return tuple(keras.tree.flatten(self.model(called, training=False)))


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    keras.config.set_dtype_policy("float32")
    model = load_model(source)
    inputs = read_inputs(model, example)
    names = output_names(model)
    module = Flat(model, list(inputs)).eval()
    with torch.no_grad():
        answered = module(*map(torch.from_numpy, inputs.values()))
    outputs = {name: value.cpu().numpy() for name, value in zip(names, answered, strict=True)}
    # PyTorch would unroll the steps of a recurrent layer: their number stays that of the example.
    kinds = keras.layers.RNN, keras.layers.Bidirectional
    recurrent = any(isinstance(layer, kinds) for layer in model._flatten_layers(include_self=False))
    varying = {
        name: [at for at, size in enumerate(tensor.shape) if at and size is None and not recurrent]
        for name, tensor in zip(inputs, model.inputs, strict=True)
    }
    export_module(module, inputs, names, out, varying=varying, in_order=True)
    scores, activation = find_scores(outputs)
    write_about(
        out, inputs, outputs, framework=f"Keras {keras.__version__} on torch {torch.__version__}",
        converter=f"torch.onnx of torch {torch.__version__}", kind=type(model).__name__,
        scores=scores, activation=activation,
    )  # fmt: skip


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
