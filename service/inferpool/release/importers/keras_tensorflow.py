# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "keras>=3.12",
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "tensorflow-cpu>=2.18",
#   "tf2onnx>=1.17",
# ]
# ///
"""Converts a model of Keras to ONNX, computed by TensorFlow and converted by tf2onnx.

    keras_tensorflow.py MODEL.keras EXAMPLE.npz OUT

For recurrent layers over sequences of any length, and layers that only TensorFlow has.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
import tf2onnx
from conversion import find_scores, write_about
from keras_files import arguments, load_model, output_names, read_inputs
from saved_model import tensors_of, write_onnx


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    model = load_model(source)
    inputs = read_inputs(model, example)
    names = output_names(model)
    answered = keras.tree.flatten(model(arguments(model, tensors_of(inputs)), training=False))
    outputs = {name: value.numpy() for name, value in zip(names, answered, strict=True)}
    specs = [
        tf.TensorSpec(tensor.shape, tensor.dtype, name=name)
        for name, tensor in zip(inputs, model.inputs, strict=True)
    ]

    @tf.function(input_signature=specs)  # type: ignore[untyped-decorator]
    def answer(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        called = arguments(model, dict(zip(inputs, tensors, strict=True)))
        return dict(zip(names, keras.tree.flatten(model(called, training=False)), strict=True))

    with tempfile.TemporaryDirectory() as folder:
        holder = tf.Module()
        holder.model = model
        tf.saved_model.save(holder, folder, signatures={"serving_default": answer})
        write_onnx(Path(folder), "serving_default", out)
    scores, activation = find_scores(outputs)
    write_about(
        out, inputs, outputs, framework=f"Keras {keras.__version__} on TensorFlow {tf.__version__}",
        converter=f"tf2onnx {tf2onnx.__version__}", kind=type(model).__name__, scores=scores,
        activation=activation,
    )  # fmt: skip


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
