"""Remedies for models whose rows cannot share a run: a line of `model.toml` or of the export."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from inferpool.tensors import name_text


class Obstacle(StrEnum):
    """The reasons why rows of different requests cannot share a run."""

    TURNED_OFF = "turned off"
    NO_REQUIRED_INPUT = "no required input"
    NO_TENSOR = "no tensor"
    UNKNOWN_RANK = "unknown rank"
    SCALAR = "scalar"
    FIXED_ROWS = "fixed rows"
    NOTHING_RUNS = "nothing runs"
    ANSWERS_CHANGE = "answers change"
    ROWS_LOST = "rows lost"
    ROWS_MIXED = "rows mixed"
    ROWS_ALIKE = "rows alike"
    RAISED = "raised"


_SAMPLE: Final = (
    'add a golden sample beside model.toml: samples/one.json with {"inputs": …, "outputs": {"NAME": …}'
)
_REMEDIES: Final = {
    Obstacle.TURNED_OFF: 'in model.toml, below [batching], remove "enabled = false"',
    Obstacle.NO_REQUIRED_INPUT: "in the export, give no default to the input that has the rows",
    Obstacle.NO_TENSOR: (
        "in the export, return tensors only; for a scikit-learn classifier:"
        ' convert_sklearn(model, …, options={"zipmap": False})'
    ),
    Obstacle.SCALAR: "in the export, give <tensor> a first dimension for the rows",
    Obstacle.NOTHING_RUNS: _SAMPLE,
    Obstacle.ANSWERS_CHANGE: (
        "in the export, call model.eval() first, take random numbers as an input or from a fixed seed,"
        " and keep nothing between two calls"
    ),
    Obstacle.ROWS_LOST: "in the model, return one row of <tensor> for each row of the input, in order",
    Obstacle.ROWS_MIXED: (
        "in the export, call model.eval() first, and quantise or normalise each row by itself; if rows are"
        ' meant to depend on one another, write "enabled = false" below [batching] in model.toml'
    ),
    Obstacle.ROWS_ALIKE: _SAMPLE,
    Obstacle.RAISED: (
        "in the model, take the number of rows from the input (x.shape[0], or -1 in a reshape),"
        " not from the example it was exported with"
    ),
}
_DYNAMIC_ROWS: Final = {
    "onnx": (
        "in the export, leave the first dimension of <tensor> open: torch.onnx.export(…, dynamic_shapes=({0:"
        ' torch.export.Dim("rows")},)), FloatTensorType([None, …]) in skl2onnx, or the like elsewhere'
    ),
    "torch": (
        "in the export, leave the first dimension of <tensor> open: torch.export.export(…, dynamic_shapes="
        '({0: torch.export.Dim("rows")},)), with one {0: …} for each argument'
    ),
}


def find_remedy(obstacle: Obstacle, tensor: str, *, is_input: bool, backend: str, form: str) -> str:
    """The line to change. `tensor` is the name of the input or output that the obstacle is about, or "".

    `backend` is the backend's name, `form` the kind of model file among those the backend has.
    """
    if obstacle not in (Obstacle.FIXED_ROWS, Obstacle.UNKNOWN_RANK):
        return _REMEDIES[obstacle].replace("<tensor>", name_text(tensor))
    if not is_input:
        return _REMEDIES[Obstacle.RAISED]
    if form.startswith("TorchScript"):
        return f"in model.toml, below [[inputs]] of {name_text(tensor)}, let shape begin with -1"
    line = _DYNAMIC_ROWS.get(backend, "in the export, leave the first dimension of <tensor> open")
    return line.replace("<tensor>", name_text(tensor))
