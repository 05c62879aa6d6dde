"""A batch: rows of entries that run together, and what becomes of them.

`gather` makes the inputs of a batch, `scatter` gives its outputs back to the entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from inferpool.errors import InferpoolError, Reason
from inferpool.pool.padding import Padding
from inferpool.pool.ports import Entry
from inferpool.tensors import Array, Tensors, shape_text


class WrongRows(Exception):
    """An output does not have as many rows as its batch, so that no entry's rows can be found in it."""


class RowSlice:
    """The rows `start` to `stop` of an entry, which run in one batch."""

    __slots__ = ("entry", "start", "stop")

    def __init__(self, entry: Entry, start: int, stop: int) -> None:
        self.entry = entry
        self.start = start
        self.stop = stop

    @property
    def rows(self) -> int:
        """How many rows the slice has."""
        return self.stop - self.start

    @property
    def has_all_rows(self) -> bool:
        """Whether the slice has every row of its entry."""
        return self.stop - self.start == self.entry.rows

    @property
    def is_split(self) -> bool:
        """Whether the request has more rows than these, so that its result needs other slices, too."""
        return self.stop - self.start != self.entry.rows or self.entry.part_of != 0


RUNS: Final = 0
ABANDONED: Final = 1
"""Nobody waits for any entry of the batch."""
TIMED_OUT: Final = 2
"""The batch has run for longer than a run may take."""
PARTED: Final = 3
"""The batch has run for much longer than expected, so that its entries are to run alone."""


class Batch:
    """Slices that run together.

    Attributes:
        slices: at least one.
        batched: whether outputs have a row for every row of the inputs (law 5).
        reason: why the batch is no larger, for `batches_total`.
        taken: moment at which an instance took the batch.
        padding: how rows of different lengths are brought to one length; None if all lengths are equal.
        rows: rows of all slices.
        answered: the ids of entries whose request has its result although this batch still runs, because its
            deadline has passed, say. Each of them is in `slices`. None while there are none.
        stopped: why the run was asked to end; RUNS if it was not.
        row_s: seconds that tenants were charged with for a row; negative unless several share the device.
    """

    __slots__ = ("answered", "batched", "padding", "reason", "row_s", "rows", "slices", "stopped", "taken")

    def __init__(
        self,
        slices: list[RowSlice],
        batched: bool,
        reason: str,
        taken: float,
        padding: Padding | None = None,
    ) -> None:
        self.slices = slices
        self.batched = batched
        self.reason = reason
        self.taken = taken
        self.padding = padding
        self.answered: set[int] | None = None
        self.stopped = RUNS
        self.row_s = -1.0
        # Counted once, because every result of the batch tells this number.
        self.rows = 0
        for row_slice in slices:
            self.rows += row_slice.rows

    def answer(self, entry_ids: Sequence[int]) -> None:
        """Take note that nobody waits for these entries any more."""
        self.answered = (self.answered or set()).union(entry_ids)

    def waiting_slices(self) -> list[RowSlice]:
        """Return the slices whose request still waits for its result."""
        if self.answered is None:
            return self.slices
        return [each for each in self.slices if each.entry.id not in self.answered]

    @property
    def load(self) -> float:
        """Cost of the batch, in rows like those that were measured at load."""
        load = 0.0
        for row_slice in self.slices:
            load += row_slice.rows * row_slice.entry.row_load
        return load


class Outcome:
    """How a slice ended: with its outputs, or with an error."""

    __slots__ = ("error", "outputs", "row_slice")

    def __init__(self, row_slice: RowSlice, outputs: Tensors | None, error: InferpoolError | None) -> None:
        self.row_slice = row_slice
        self.outputs = outputs
        self.error = error


class Run:
    """How a batch ended.

    Attributes:
        outcomes: one per slice; several for a slice whose rows ran one by one.
        compute_s: seconds that the batch ran.
        clean: whether the batch ran undivided and without an error, and computed no gradients, which take
            longer than outputs.
        wrong_rows: the output that did not have the batch's rows; None if all outputs had them.
        undivided: the entries that have no outcome, because they have to run with all their rows at once.
    """

    __slots__ = ("clean", "compute_s", "outcomes", "undivided", "wrong_rows")

    def __init__(
        self,
        outcomes: list[Outcome],
        compute_s: float,
        clean: bool,
        wrong_rows: Reason | None = None,
        undivided: Sequence[Entry] = (),
    ) -> None:
        self.outcomes = outcomes
        self.compute_s = compute_s
        self.clean = clean
        self.wrong_rows = wrong_rows
        self.undivided = undivided


def gather(slices: Sequence[RowSlice], padding: Padding | None = None) -> Tensors:
    """Return the inputs of a batch: the slices' rows, in order, along the first dimension.

    All slices belong to one group. They have the same inputs, datatypes and row shapes, or `padding` gives
    them the same row shapes. A batch of one undivided entry is the entry's own inputs, not a copy.
    """
    if len(slices) == 1:
        only = slices[0]
        inputs = only.entry.inputs
        if only.has_all_rows:
            return inputs
        return {name: tensor[only.start : only.stop] for name, tensor in inputs.items()}
    if padding is not None and len({padding.length(each.entry.inputs) for each in slices}) > 1:
        return padding.gather([gather([each]) for each in slices])
    return {
        name: np.concatenate([_rows_of(each, name) for each in slices]) for name in slices[0].entry.inputs
    }


def _rows_of(row_slice: RowSlice, name: str) -> Array:
    tensor = row_slice.entry.inputs[name]
    return tensor if row_slice.has_all_rows else tensor[row_slice.start : row_slice.stop]


def gather_separately(slices: Sequence[RowSlice], padding: Padding | None = None) -> list[Tensors]:
    """Return the inputs of each slice, uncopied, for a model that puts them together itself.

    If `padding` has to bring the rows to one length, the list has one item with all rows.
    """
    if padding is not None and len({padding.length(each.entry.inputs) for each in slices}) > 1:
        return [gather(slices, padding)]
    return [gather([each]) for each in slices]


def wanted_outputs(slices: Sequence[RowSlice]) -> tuple[str, ...] | None:
    """Return the names of all outputs that any of the entries asked for; None means every output."""
    wanted: dict[str, None] = {}
    for row_slice in slices:
        if row_slice.entry.outputs is None:
            return None
        wanted.update(dict.fromkeys(row_slice.entry.outputs))
    return tuple(wanted)


def scatter(outputs: Tensors, slices: Sequence[RowSlice], padding: Padding | None = None) -> list[Tensors]:
    """Return each slice's rows of the outputs that its entry asked for, as views, in the order of `slices`.

    Values that padding has added are cut off. An output that is a list has an item for each row. Raises
    WrongRows unless every output has the batch's rows along its first dimension.
    """
    rows = sum(each.rows for each in slices)
    for name, tensor in outputs.items():
        if isinstance(tensor, list):
            if len(tensor) != rows:
                raise WrongRows(f'output "{name}" has {len(tensor)} items for {rows} rows')
        elif not tensor.ndim or tensor.shape[0] != rows:
            raise WrongRows(f'output "{name}" has shape {shape_text(tensor.shape)} for {rows} rows')
    if len(slices) == 1:
        return [select(outputs, slices[0].entry.outputs)]
    scattered = []
    start = 0
    for row_slice in slices:
        stop = start + row_slice.rows
        chosen = select(outputs, row_slice.entry.outputs)
        own = {name: tensor[start:stop] for name, tensor in chosen.items()}
        if padding is not None:
            own = padding.cut(own, padding.length(row_slice.entry.inputs))
        scattered.append(own)
        start = stop
    return scattered


def select(outputs: Tensors, names: tuple[str, ...] | None) -> Tensors:
    """Return the outputs of these names, in this order; all outputs if `names` is None."""
    return outputs if names is None else {name: outputs[name] for name in names}


def concatenate(outputs: Sequence[Tensors]) -> Tensors:
    """Return the outputs of consecutive rows as one; raises ValueError if their row shapes differ."""
    joined: dict[str, Any] = {}
    for name, first in outputs[0].items():
        if isinstance(first, list):
            joined[name] = [item for each in outputs for item in each[name]]
        else:
            joined[name] = np.concatenate([each[name] for each in outputs])
    return joined
