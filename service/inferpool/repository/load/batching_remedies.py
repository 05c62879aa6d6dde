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
    "add a golden sample beside the folders of the versions: samples/one.json with"
    ' {"inputs": …, "outputs": {"NAME": …}}'
)
_ROWS: Final = (
    "take the number of rows from the input (x.shape[0], or -1 in a reshape), not from the example it was"
    " exported with"
)
_LOST: Final = "in the model, return one row of <tensor> for each row of the input, in order"
_REMEDIES: Final = {
    Obstacle.TURNED_OFF: 'in model.toml, below [batching], remove "enabled = false"',
    Obstacle.NO_REQUIRED_INPUT: "in the export, give no default to the input that has the rows",
    Obstacle.NO_TENSOR: (
        "in the export, return tensors only; for a scikit-learn classifier:"
        ' convert_sklearn(model, …, options={"zipmap": False})'
    ),
    Obstacle.UNKNOWN_RANK: (
        "in the export, give <tensor> a shape that begins with an open dimension: FloatTensorType([None, …])"
        " in skl2onnx, tf.TensorSpec([None, …]) in tf2onnx, or the like elsewhere"
    ),
    Obstacle.SCALAR: "in the export, give <tensor> a first dimension for the rows",
    Obstacle.NOTHING_RUNS: _SAMPLE,
    Obstacle.ANSWERS_CHANGE: (
        "in the export, call model.eval() first, take random numbers as an input, and keep nothing between"
        " two calls"
    ),
    Obstacle.ROWS_LOST: _LOST,
    Obstacle.ROWS_MIXED: (
        "in the export, call model.eval() first, and compute each row by itself, without a mean, a maximum or"
        " a scale over the rows; if rows are meant to depend on one another, write"
        ' "enabled = false" below [batching] in model.toml'
    ),
    Obstacle.ROWS_ALIKE: _SAMPLE,
    Obstacle.RAISED: f"in the model, {_ROWS}",
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
    if obstacle != Obstacle.FIXED_ROWS:
        line = _REMEDIES[obstacle]
    elif not is_input:
        line = f"{_LOST}, and {_ROWS}"
    elif form.startswith("TorchScript"):
        line = "in model.toml, below [[inputs]] of <tensor>, let shape begin with -1"
    else:
        line = _DYNAMIC_ROWS.get(backend, "in the export, leave the first dimension of <tensor> open")
    return line.replace("<tensor>", name_text(tensor))
