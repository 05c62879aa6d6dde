# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "tensorflow-cpu>=2.18",
#   "tf2onnx>=1.17",
# ]
# ///
"""Converts a SavedModel of TensorFlow to ONNX by tf2onnx: the signature `serving_default`, or the only one.

saved_model.py FOLDER EXAMPLE.npz OUT
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
import tf2onnx
from conversion import Array, find_scores, match_names, read_arrays, write_about

OPSET = 17


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    signature, name = signature_of(tf.saved_model.load(str(source)))
    specs = signature.structured_input_signature[1]
    if any(spec.dtype == tf.string for spec in specs.values()):
        sys.exit(
            "the signature takes strings, which are not converted: save the model that begins behind their"
            " layer, and let tokenizer.json beside the versions make the numbers (docs/text.md)"
        )
    inputs = {
        each: array.astype(specs[each].dtype.as_numpy_dtype)
        for each, array in match_names(read_arrays(example), list(specs)).items()
    }
    outputs = {each: value.numpy() for each, value in signature(**tensors_of(inputs)).items()}
    write_onnx(source, name, out)
    scores, activation = find_scores(outputs)
    version = tf.__version__
    write_about(
        out, inputs, outputs, framework=f"TensorFlow {version}", converter=f"tf2onnx {tf2onnx.__version__}",
        kind="SavedModel", scores=scores, activation=activation,
    )  # fmt: skip


def signature_of(loaded: Any) -> tuple[Any, str]:
    """Return the signature that is converted, and its name; exits if there is none, or there are several."""
    # Keras 3 also writes `serve`, the same function.
    names = [each for each in loaded.signatures if each != "__saved_model_init_op"]
    name = "serving_default" if "serving_default" in names else names[0] if len(names) == 1 else None
    if name is None:
        sys.exit(f"the SavedModel has no signature serving_default; it has {', '.join(names) or 'none'}")
    return loaded.signatures[name], name


def tensors_of(inputs: dict[str, Array]) -> dict[str, Any]:
    """Return the arguments of a signature."""
    return {name: tf.constant(array) for name, array in inputs.items()}


def write_onnx(source: Path, signature: str, out: Path) -> None:
    """Write `model.onnx` by the program of tf2onnx, whose names are those of the signature."""
    command = [
        sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(source), "--signature_def", signature,
        "--tag", "serve", "--opset", str(OPSET), "--output", str(out / "model.onnx"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"tf2onnx cannot convert it: {(done.stderr.strip() or 'it gave no reason').splitlines()[-1]}"
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
