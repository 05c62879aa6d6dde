"""Model files that no backend loads: how to convert them to one that can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from inferpool.errors import Reason

_IMPORT: Final = "Convert it: inferpool import {} --example ROWS.csv --to NAME"
_SCIKIT_LEARN: Final = f"a pickled Python object. {_IMPORT.format('FILE')}"
_KERAS: Final = f"a Keras model. {_IMPORT.format('FILE')}"
_WEIGHTS: Final = (
    "weights of PyTorch without the model. Convert them with the function that returns the module: inferpool"
    " import FILE.py:FUNCTION --weights WEIGHTS --trust --example ROWS.npz --to NAME"
)
_REMEDIES: Final = {
    ".pkl": _SCIKIT_LEARN,
    ".pickle": _SCIKIT_LEARN,
    ".joblib": _SCIKIT_LEARN,
    ".h5": _KERAS,
    ".hdf5": _KERAS,
    ".keras": _KERAS,
    ".pth": f"{_WEIGHTS}; if the file is TorchScript (torch.jit.save), rename it to model.pt",
    ".ckpt": _WEIGHTS,
    ".safetensors": (
        "weights without the model. Convert a Hugging Face model with Optimum: optimum-cli export onnx"
        " --model FOLDER OUTPUT"
    ),
    ".pb": (
        "a TensorFlow model. Convert the folder of a SavedModel:"
        " inferpool import FOLDER --example ROWS.npz --to NAME"
    ),
    ".tflite": (
        "a TensorFlow Lite model. Convert it with tf2onnx: python -m tf2onnx.convert --tflite FILE"
        " --output model.onnx"
    ),
    ".ubj": f"an XGBoost model. {_IMPORT.format('FILE')}",
    ".cbm": f"a CatBoost model. {_IMPORT.format('FILE')}",
    ".engine": (
        "a TensorRT engine, which runs on one kind of GPU only. Serve the ONNX file that it was built from,"
        " and write tensorrt = true below [gpu] in model.toml"
    ),
    ".gguf": "a language model for llama.cpp, which Inferpool does not serve",
}


def find_conversion(file: Path) -> Reason | None:
    """Return the kind of model that `file` is and how to convert it; None if it looks like no model file."""
    return _REMEDIES.get(file.suffix.lower())
