"""Finds rows that a model runs: from inputs that are known to fit, or made up from its signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.backends.made_up_inputs import SEED, made_up_rows
from inferpool.errors import OutOfMemory, Reason, short_reason
from inferpool.repository.load.list_outputs import NoTableError
from inferpool.tensors import Array, Signature, Tensors

ROWS: Final = 8
"""How many different rows are found."""

MOST_SAMPLE_ROWS: Final = 64
"""How many rows of golden samples are used."""

_TRIED: Final = 3
"""How many rows run before all are believed to run."""


class RunnableRows(NamedTuple):
    """Rows that a model runs.

    Attributes:
        rows: different rows, along the first dimension; empty if none were found.
        fault: why the last attempt failed; None if rows were found.
    """

    rows: Tensors
    fault: Reason | None


def find_runnable_rows(model: LoadedModel, samples: Sequence[Tensors]) -> RunnableRows:
    """Find rows that `model` runs: `samples`, inputs that it is known to take, or else made-up rows.

    Raises OutOfMemory if a GPU has no memory for one row, and NoTableError for a list that is no table.
    """
    fault: Reason = "they would take too much memory"
    for rows in _candidates(model.signature, samples):
        try:
            for row in range(min(_TRIED, count_rows(rows))):
                model.run(rows_between(rows, row, row + 1))
            return RunnableRows(rows, None)
        except (OutOfMemory, NoTableError):
            raise  # other rows need as much memory, and get such lists, too
        except Exception as error:  # noqa: BLE001 - made-up rows may be nonsense to the model
            fault = short_reason(error)
    return RunnableRows({}, fault)


def rows_by_shape(samples: Sequence[Tensors]) -> list[Tensors]:
    """The rows of all samples, joined if they have the same shapes, in the order of the first of each."""
    groups: dict[object, list[Tensors]] = {}
    for sample in samples:
        counts = {len(tensor) if tensor.ndim else 0 for tensor in sample.values()}
        if len(counts) == 1 and 0 not in counts:
            shapes = tuple(sorted((name, tensor.shape[1:]) for name, tensor in sample.items()))
            groups.setdefault(shapes, []).append(sample)
    return [
        {name: np.concatenate([each[name] for each in group]) for name in group[0]}
        for group in groups.values()
    ]


def count_rows(rows: Tensors) -> int:
    """The number of rows."""
    return len(next(iter(rows.values())))


def rows_between(rows: Tensors, start: int, stop: int) -> Tensors:
    """The rows `start` to `stop`, as views."""
    return {name: tensor[start:stop] for name, tensor in rows.items()}


def repeat_rows(rows: Tensors, count: int) -> Tensors:
    """`count` rows: those of `rows`, over and over."""
    chosen = repeated_indexes(rows, count)
    return {name: tensor[chosen] for name, tensor in rows.items()}


def repeated_indexes(rows: Tensors, count: int) -> list[int]:
    """The indexes into `rows` that `repeat_rows` takes."""
    available = count_rows(rows)
    return [row % available for row in range(count)]


def reversed_rows(rows: Tensors) -> Tensors:
    """The rows from the last to the first, as views."""
    return {name: tensor[::-1] for name, tensor in rows.items()}


def _candidates(signature: Signature, samples: Sequence[Tensors]) -> Iterator[Tensors]:
    known = rows_by_shape(samples)
    if known:
        rng = np.random.default_rng(SEED)
        yield {name: _varied(tensor, rng) for name, tensor in known[0].items()}
        # A model may take no values but those of the samples.
        yield from (repeat_rows(rows, max(ROWS, min(count_rows(rows), MOST_SAMPLE_ROWS))) for rows in known)
    yield from made_up_rows(signature.inputs, ROWS)


def _varied(tensor: Array, rng: np.random.Generator) -> Array:
    """Make at least `ROWS` rows from a sample's rows, all different if possible."""
    count = max(ROWS, min(len(tensor), MOST_SAMPLE_ROWS))
    rows: Array = tensor[np.arange(count) % len(tensor)].copy()
    for row in range(len(tensor), count):
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
