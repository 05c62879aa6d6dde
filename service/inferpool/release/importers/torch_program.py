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

import sys
from pathlib import Path
from typing import Any

import torch
from conversion import find_scores, match_names, read_arrays, write_about


def main(source: Path, example: Path, out: Path) -> None:
    """Convert `source`; exits with a message if the example does not fit."""
    program = torch.export.load(source)
    arrays = match_names(read_arrays(example), list(program.graph_signature.user_inputs))
    with torch.no_grad():
        answered: Any = program.module()(*map(torch.from_numpy, arrays.values()))
    values = list(answered) if isinstance(answered, list | tuple) else [answered]
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    if converted is None:
        sys.exit("the exporter returned nothing")
    converted.save(out / "model.onnx")
    names = [each.name for each in converted.model.graph.outputs]
    outputs = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    scores, activation = find_scores(outputs)
    version = torch.__version__
    write_about(
        out, arrays, outputs, framework=f"torch {version}", converter=f"torch.onnx of torch {version}",
        kind="exported program", scores=scores, activation=activation,
    )  # fmt: skip


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
