"""Finds rows that a model runs: from inputs that are known to fit, or made up from its signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.backends.made_up_inputs import SEED, made_up_rows
from inferpool.errors import OutOfMemory, Reason, short_reason
from inferpool.tensors import Array, Signature, Tensors

ROWS: Final = 8
"""How many different rows are found."""


class RunnableRows(NamedTuple):
    """Rows that a model runs.

    Attributes:
        rows: different rows, along the first dimension; empty if none were found.
        seconds: how long the run of one row takes.
        fault: why the last attempt failed; None if rows were found.
    """

    rows: Tensors
    seconds: float
    fault: Reason | None


def find_runnable_rows(
    model: LoadedModel, samples: Sequence[Tensors], clock: Callable[[], float]
) -> RunnableRows:
    """Find rows that `model` runs: `samples`, inputs that it is known to take, or else made-up rows.

    Raises OutOfMemory if a GPU has no memory for one row.
    """
    fault: Reason = "its inputs are not known"
    for rows in _candidates(model.signature, samples):
        try:
            model.run(rows_between(rows, 0, 1))  # the first run may be slower than any other
            began = clock()
            for row in range(1, 3):
                model.run(rows_between(rows, row, row + 1))
            return RunnableRows(rows, (clock() - began) / 2, None)
        except OutOfMemory:
            raise  # other rows need as much memory
        except Exception as error:  # noqa: BLE001 - made-up rows may be nonsense to the model
            fault = short_reason(error)
    return RunnableRows({}, 0.0, fault)


def rows_between(rows: Tensors, start: int, stop: int) -> Tensors:
    """The rows `start` to `stop`, as views."""
    return {name: tensor[start:stop] for name, tensor in rows.items()}


def repeat_rows(rows: Tensors, count: int) -> Tensors:
    """`count` rows: those of `rows`, over and over."""
    chosen = repeated_indexes(rows, count)
    return {name: tensor[chosen] for name, tensor in rows.items()}


def repeated_indexes(rows: Tensors, count: int) -> list[int]:
    """The indexes into `rows` that `repeat_rows` takes."""
    available = len(next(iter(rows.values())))
    return [row % available for row in range(count)]


def reversed_rows(rows: Tensors) -> Tensors:
    """The rows from the last to the first, as views."""
    return {name: tensor[::-1] for name, tensor in rows.items()}


def _candidates(signature: Signature, samples: Sequence[Tensors]) -> Iterator[Tensors]:
    usable = [sample for sample in samples if all(tensor.ndim and len(tensor) for tensor in sample.values())]
    if usable:
        rng = np.random.default_rng(SEED)
        shapes = {name: tensor.shape[1:] for name, tensor in usable[0].items()}
        alike = [sample for sample in usable if {n: t.shape[1:] for n, t in sample.items()} == shapes]
        yield {name: _varied(np.concatenate([sample[name] for sample in alike]), rng) for name in shapes}
    yield from made_up_rows(signature.inputs, ROWS)


def _varied(tensor: Array, rng: np.random.Generator) -> Array:
    """Make `ROWS` rows from a sample's rows, all different if possible."""
    rows: Array = tensor[np.arange(ROWS) % len(tensor)].copy()
    for row in range(len(tensor), ROWS):
        if rows.dtype.kind == "f":
            rows[row] = rows[row] * rng.uniform(0.5, 1.5, rows[row].shape).astype(rows.dtype)
        elif rows.dtype.kind == "O":
            rows[row] = np.array([f"{text} {row}" for text in tensor[0].ravel()], object).reshape(
                rows[row].shape
            )
        else:
            # Only values that the sample has: an id outside the vocabulary would make the model raise.
            rows[row] = rng.choice(np.unique(tensor), rows[row].shape)
    return rows
