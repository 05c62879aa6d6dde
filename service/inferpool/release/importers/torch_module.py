# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxscript>=0.5",
#   "torch>=2.9",
# ]
# ///
"""Converts a module of PyTorch to ONNX: of a function that returns the module, or pickled by `torch.save`.

    torch_module.py FILE.py:FUNCTION EXAMPLE.npz OUT [--weights STATE_DICT.pt]
    torch_module.py MODEL.pt EXAMPLE.npz OUT

Either runs the code of the file. The weights alone are loaded without running code.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversion import Array, find_scores, match_names, read_arrays, write_about
from torch_export import as_arrays, export_module


def main(source: str, example: Path, out: Path, weights: Path | None) -> None:
    """Convert `source`; exits with a message if it cannot be converted."""
    file, colon, function = source.rpartition(":")
    module = build(Path(file), function, weights) if colon and file.endswith(".py") else load(Path(source))
    module.eval()
    parameters = inspect.signature(module.forward).parameters.values()
    arrays = read_arrays(example)
    names = [each.name for each in parameters if each.default is each.empty or each.name in arrays]
    floating = [each.dtype for each in module.parameters() if each.dtype.is_floating_point]
    double = torch.float64 in floating
    inputs: dict[str, Array] = {
        name: array.astype(np.float64 if double else np.float32) if array.dtype.kind == "f" else array
        for name, array in match_names(arrays, names).items()
    }
    with torch.no_grad():
        outputs = as_arrays(module(**{name: torch.from_numpy(array) for name, array in inputs.items()}))
    # Token ids have sentences of any length; the sizes of other inputs are the model's.
    varying = {name: range(1, array.ndim) for name, array in inputs.items() if array.dtype.kind in "iu"}
    export_module(module, inputs, list(outputs), out, varying=varying)
    scores, activation = find_scores(outputs)
    version = torch.__version__
    write_about(
        out, inputs, outputs, framework=f"torch {version}", converter=f"torch.onnx of torch {version}",
        kind=type(module).__name__, scores=scores, activation=activation,
    )  # fmt: skip


def build(file: Path, function: str, weights: Path | None) -> torch.nn.Module:
    """Return the module that the function of a file returns, with the weights of a state_dict, if any."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        sys.exit(f"{file.name} is no module of Python")
    sys.path.append(str(file.parent))  # its own imports
    imported = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = imported
    spec.loader.exec_module(imported)
    if not callable(getattr(imported, function, None)):
        sys.exit(f"{file.name} has no function {function}")
    module = getattr(imported, function)()
    if not isinstance(module, torch.nn.Module):
        sys.exit(f"{function} returns a {type(module).__name__}, not a torch.nn.Module")
    if weights is not None:
        state: Any = torch.load(weights, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        try:
            module.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            sys.exit(f"{weights.name} does not fit the module: {' '.join(str(error).split())[:400]}")
    return module


def load(file: Path) -> torch.nn.Module:
    """Return a pickled module; exits if the file has something else."""
    hint = "import FILE.py:FUNCTION with --weights"
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=False)
    except (AttributeError, ModuleNotFoundError) as error:
        sys.exit(f"the code of its class is not here ({error}): {hint}")
    if isinstance(loaded, torch.jit.ScriptModule):
        sys.exit("it is TorchScript, which is served as it is: name it model.pt")
    if isinstance(loaded, dict):
        sys.exit(f"it has weights without the module: {hint} {file.name}")
    if not isinstance(loaded, torch.nn.Module):
        sys.exit(f"it has a {type(loaded).__name__}, not a torch.nn.Module")
    return loaded


if __name__ == "__main__":
    given = Path(sys.argv[5]) if sys.argv[4:5] == ["--weights"] else None
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), given)
