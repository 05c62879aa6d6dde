# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26",
#   "onnx>=1.21",
#   "onnxscript>=0.5",
#   "torch>=2.9",
# ]
# ///
"""Converts a program of `torch.export.save` (`.pt2`) to ONNX.

    torch_program.py MODEL.pt2 EXAMPLE.npz OUT

Inputs keep the names of the module's parameters. The first dimension of every input has to be dynamic in the
program, or its batches are of one size: `dynamic_shapes={"x": {0: torch.export.Dim("rows")}}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if the example does not fit."""
    program = torch.export.load(source)
    names = list(program.graph_signature.user_inputs)
    with np.load(example, allow_pickle=False) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    if len(arrays) == len(names) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if sorted(arrays) != sorted(names):
        sys.exit(f"the program takes {', '.join(names)}; the example has {', '.join(arrays)}")
    inputs = [torch.from_numpy(arrays[name]) for name in names]
    with torch.no_grad():
        answered: Any = program.module()(*inputs)
    values = list(answered) if isinstance(answered, list | tuple) else [answered]
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    if converted is None:
        sys.exit("the exporter returned nothing")
    converted.save(out / "model.onnx")
    outputs = [each.name for each in converted.model.graph.outputs]
    named = {f"in:{name}": arrays[name] for name in names}
    np.savez(
        out / "imported.npz",
        **named,
        **{f"out:{name}": value.numpy() for name, value in zip(outputs, values, strict=True)},
    )
    about = {
        "framework": f"torch {torch.__version__}",
        "converter": f"torch.onnx of torch {torch.__version__}",
        "kind": "exported program",
        "classes": None,
        "scores": outputs[0],
        "activation": "softmax",
    }
    (out / "imported.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
