"""Model files that no backend loads: how to convert them to one that can be served.

The commands are to be typed in the models folder.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from inferpool.errors import Reason

_IMPORT: Final = "In the models folder, convert it: inferpool import {file} --example ROWS.csv --to {name}"
_SCIKIT_LEARN: Final = "a pickled Python object. " + _IMPORT
_KERAS: Final = "a Keras model. " + _IMPORT
_WEIGHTS: Final = (
    "weights of PyTorch without the model. In the models folder, convert them with the function that returns"
    " the module: inferpool import SCRIPT.py:FUNCTION --weights {file} --trust --example ROWS.npz --to {name}"
)
_REMEDIES: Final = {
    ".pkl": _SCIKIT_LEARN,
    ".pickle": _SCIKIT_LEARN,
    ".joblib": _SCIKIT_LEARN,
    ".h5": _KERAS,
    ".hdf5": _KERAS,
    ".keras": _KERAS,
    ".pth": _WEIGHTS,
    ".ckpt": _WEIGHTS,
    ".safetensors": (
        "weights without the model. In the models folder, convert the folder of a Hugging Face model:"
        " inferpool import {folder} --example TEXTS.txt --to {name}"
    ),
    ".pb": (
        "a TensorFlow model. In the models folder, convert the folder of a SavedModel:"
        " inferpool import {folder} --example ROWS.npz --to {name}"
    ),
    ".tflite": (
        "a TensorFlow Lite model. In the models folder, convert it with tf2onnx:"
        " python -m tf2onnx.convert --tflite {file} --output {onnx}"
    ),
    ".ubj": "an XGBoost model. " + _IMPORT,
    ".cbm": "a CatBoost model. " + _IMPORT,
    ".engine": (
        "a TensorRT engine, which runs on one kind of GPU only. Serve the ONNX file that it was built from,"
        " and write tensorrt = true below [gpu] in model.toml"
    ),
    ".gguf": "a language model for llama.cpp, which Inferpool does not serve",
}


def is_foreign(file: Path) -> bool:
    """Whether `file` looks like a model of another library."""
    return file.suffix.lower() in _REMEDIES


def find_conversion(file: Path, repository: Path) -> Reason | None:
    """Return the kind of model that `file` is and how to convert it; None if it looks like no model file.

    `repository` is the models folder.
    """
    remedy = _REMEDIES.get(file.suffix.lower())
    if remedy is None:
        return None
    shown = file.relative_to(repository)
    model, *below = shown.parts
    names = {
        "file": shown,
        "folder": shown.parent,
        "onnx": shown.with_suffix(".onnx"),
        "name": model if below else shown.stem,
    }
    remedy = remedy.format_map({word: shlex.quote(str(path)) for word, path in names.items()})
    in_version = len(below) == 2 and below[0].isdigit()
    if in_version and "--to " in remedy:
        # The conversion becomes a version of its own.
        remedy = f"{remedy}; then remove {shown.parent}"
    if file.suffix.lower() == ".pth":
        name = "model.pt" if in_version else f"{shown.stem}.pt"
        remedy = f"{remedy}. If the file is TorchScript (torch.jit.save), rename it to {name}"
    return remedy
