"""What the scripts that export by PyTorch share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversion import Array


def export_module(
    module: torch.nn.Module,
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    out: Path,
    *,
    varying: Mapping[str, Sequence[int]],
    in_order: bool = False,
) -> None:
    """Write `model.onnx` for any number of rows; exits if PyTorch cannot.

    `inputs` are keyword arguments of the module's `forward`, or, `in_order`, what `forward(*inputs)` takes.
    `varying` has the other dimensions of an input that may vary, if the module lets them.
    """
    shapes = {
        name: {0: torch.export.Dim("rows"), **dict.fromkeys(varying.get(name, ()), torch.export.Dim.AUTO)}
        for name in inputs
    }
    # With one row the exporter would take the number of rows for a constant.
    rows = {
        name: torch.from_numpy(np.ascontiguousarray(array if len(array) > 1 else np.repeat(array, 2, axis=0)))
        for name, array in inputs.items()
    }
    called: dict[str, Any] = {"kwargs": rows, "dynamic_shapes": shapes}
    if in_order:
        called = {"args": tuple(rows.values()), "dynamic_shapes": (tuple(shapes.values()),)}
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        program = torch.onnx.export(
            module, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs), **called
        )
        if program is None:
            sys.exit("the exporter returned nothing")
        program.optimize()
        ClearMetadataAndDocStringPass()(program.model)  # they have the paths of this machine
        program.save(out / "model.onnx")
    except Exception as error:  # noqa: BLE001  # whatever the exporter raises, the file cannot be made
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sys.exit(f"PyTorch cannot export it for any number of rows: {' '.join(str(cause).split())[:400]}")


def as_arrays(answered: Any) -> dict[str, Array]:
    """Return what a module answers by name: the keys of a mapping, else `output`, or `output_0` and so on."""
    if isinstance(answered, Mapping):
        return {str(name): value.detach().numpy() for name, value in answered.items()}
    if isinstance(answered, list | tuple):
        return {f"output_{at}": value.detach().numpy() for at, value in enumerate(answered)}
    return {"output": answered.detach().numpy()}
