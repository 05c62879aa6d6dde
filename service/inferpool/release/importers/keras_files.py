"""What the scripts for models of Keras share: the file, and the rows as the model takes them."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from conversion import Array, match_names, read_arrays

STRING_LAYERS = ("TextVectorization", "StringLookup", "Hashing")


def load_model(source: Path) -> Any:
    """Load a model without running code of the file; exits with a message if that cannot be done."""
    layers = layers_of_strings(source)
    if layers:
        sys.exit(
            f"the layer {layers[0]} takes strings, which are not converted: save the model that begins behind"
            " it, and let tokenizer.json beside the versions make the numbers (docs/text.md)"
        )
    try:
        model = keras.saving.load_model(source, compile=False, safe_mode=True)
    except Exception as error:  # noqa: BLE001  # whatever Keras raises, the model cannot be read
        sys.exit(f"Keras cannot load it: {' '.join(str(error).split())[:400]}")
    if not getattr(model, "inputs", None):
        sys.exit("the model has no inputs of known shapes: call it once before it is saved")
    return model


def layers_of_strings(source: Path) -> list[str]:
    """Return the kinds of layers in a `.keras` file that take strings."""
    if not zipfile.is_zipfile(source):
        return []
    with zipfile.ZipFile(source) as archive:
        config = archive.read("config.json").decode() if "config.json" in archive.namelist() else "{}"
    return [name for name in STRING_LAYERS if f'"class_name": {json.dumps(name)}' in config]


def input_name(tensor: Any) -> str:
    """Return the name of a model's input: that of its layer, which people give."""
    return (
        str(tensor._keras_history.operation.name) if hasattr(tensor, "_keras_history") else str(tensor.name)
    )


def read_inputs(model: Any, example: Path) -> dict[str, Array]:
    """Return the rows of an example by input, in the order of the model and in its datatypes."""
    tensors = {input_name(tensor): tensor for tensor in model.inputs}
    arrays = match_names(read_arrays(example), list(tensors))
    return {name: array.astype(np.dtype(tensors[name].dtype)) for name, array in arrays.items()}


def output_names(model: Any) -> list[str]:
    """Return the names of a model's outputs: the keys of a mapping, else the names of their layers."""
    structure = getattr(model, "_outputs_struct", None)
    if isinstance(structure, dict):
        return [str(name) for name in sorted(structure)]  # as Keras flattens them
    names = [str(tensor._keras_history.operation.name) for tensor in model.outputs]
    return names if len(set(names)) == len(names) else [f"output_{at}" for at in range(len(names))]


def arguments(model: Any, arrays: dict[str, Any]) -> Any:
    """Return what the model is called with: a mapping, a list or the single input, as its inputs are."""
    structure = getattr(model, "_inputs_struct", None)
    if isinstance(structure, dict):
        return dict(arrays)
    return list(arrays.values()) if isinstance(structure, list | tuple) else next(iter(arrays.values()))
