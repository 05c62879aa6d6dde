"""Requests that run in several batches: how they are split, and how their outputs are joined.

A request is split for one of two reasons. If it has more rows than a batch may have, its rows run as slices
(`RowSlice`), one after the other. If its rows have different lengths, it comes as one `Part` per length, each
an entry of its own, because one tensor cannot hold such rows. A part with too many rows runs as slices, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from inferpool.errors import InferpoolError, InvalidInput, ModelFailed
from inferpool.pool.batch import Outcome, concatenate
from inferpool.pool.ports import Entry, Part, Result
from inferpool.tensors import Array, Tensors, shape_text


class Unjoinable(Exception):
    """The outputs of a request's rows do not fit together."""


def split_entry(entry_id: int, parts: Sequence[Part]) -> Entry:
    """Return the entry whose rows run as `parts`; it has the id `entry_id`, and the rest from the first."""
    first = parts[0].entry
    rows = nbytes = 0
    load = 0.0
    for part in parts:
        part.entry.part_of = entry_id
        rows += len(part.row_indices)
        nbytes += part.entry.nbytes
        load += part.entry.load
    whole = Entry(
        entry_id,
        first.key,
        {},
        rows,
        first.group,
        nbytes,
        first.arrived,
        first.deadline,
        first.priority,
        first.outputs,
        load / rows,
        first.request_id,
        tuple(parts),
    )
    whole.tenant = first.tenant
    whole.share = first.share
    whole.rank = first.rank
    return whole


class SplitRequest:
    """A request that runs in several batches, and the outputs that its rows have so far.

    Attributes:
        entry: the entry that gets the result.
        error: why a slice failed; None while none has.
        queue_s: seconds until an instance took the first rows.
        compute_s: seconds that the batches ran so far.
    """

    __slots__ = ("_batch_rows", "_missing_rows", "_outputs", "compute_s", "entry", "error", "queue_s")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.error: InferpoolError | None = None
        self.queue_s = 0.0
        self.compute_s = 0.0
        self._batch_rows = 0
        self._missing_rows = entry.rows
        # By the id of the entry that ran: the first row of each slice, and its outputs.
        self._outputs: dict[int, list[tuple[int, Tensors]]] = {}

    @property
    def queued_entries(self) -> list[Entry]:
        """The entries that wait and run for this request: its parts, or the request's own entry."""
        return [part.entry for part in self.entry.parts] or [self.entry]

    def add(self, outcome: Outcome, queue_s: float, compute_s: float, batch_rows: int) -> bool:
        """Take the outcome of a slice. True if it is the last one, or has failed: `result` is then known.

        The slice waited for `queue_s`, and its batch of `batch_rows` rows ran for `compute_s`.
        """
        self.queue_s = self.queue_s or queue_s
        self.compute_s += compute_s
        self._batch_rows = batch_rows
        if outcome.outputs is None:
            self.error = outcome.error
            return True
        row_slice = outcome.row_slice
        self._outputs.setdefault(row_slice.entry.id, []).append((row_slice.start, outcome.outputs))
        self._missing_rows -= row_slice.rows
        return self._missing_rows <= 0

    def result(self, max_bytes: float = math.inf) -> Result:
        """Join the outputs to the request's result. Large outputs take a while: hold no lock meanwhile.

        Outputs of parts that take more than `max_bytes` are an InvalidInput: their size grows with the
        longest row, which the client chose. Outputs that do not fit together are a ModelFailed, whose cause
        says why.
        """
        outputs: Tensors | None = None
        error = self.error
        if error is None:
            try:
                if not self.entry.parts:
                    outputs = _in_order(self._outputs[self.entry.id])
                else:
                    parts = [
                        (part.row_indices, _in_order(self._outputs[part.entry.id]))
                        for part in self.entry.parts
                    ]
                    error = _size_error(joined_bytes(parts), max_bytes)
                    if error is None:
                        outputs = join_rows(parts)
            except Unjoinable as misfit:
                error = ModelFailed(f"the outputs of the request's rows do not fit together: {misfit}")
                error.__cause__ = misfit.with_traceback(None)
            except Exception as fault:  # noqa: BLE001 - memory may run out, and the entry must still end
                error = ModelFailed("the outputs of the request's rows could not be joined")
                # The frames of the traceback hold the outputs.
                error.__cause__ = fault.with_traceback(None)
        return Result(self.entry.id, outputs, error, self.queue_s, self.compute_s, self._batch_rows)


def _size_error(size: int, max_bytes: float) -> InferpoolError | None:
    if size <= max_bytes:
        return None
    return InvalidInput(
        f"the answer takes {size} bytes with every row as long as the longest, and may take {max_bytes:.0f};"
        " send fewer rows at a time, or ask for fewer outputs",
        expected=max_bytes,
        got=size,
    )


def _in_order(slices: list[tuple[int, Tensors]]) -> Tensors:
    """Return the outputs of one entry from those of its slices, given with the first row of each."""
    if len(slices) == 1:
        return slices[0][1]
    outputs = [each for _, each in sorted(slices, key=itemgetter(0))]
    for name, first in outputs[0].items():
        if isinstance(first, list):
            continue
        shapes = {each[name].shape[1:] for each in outputs}
        if len(shapes) > 1:
            texts = " and ".join(map(shape_text, sorted(shapes)))
            raise Unjoinable(f'output "{name}" has rows of the shapes {texts}')
    return concatenate(outputs)


def join_rows(parts: Sequence[tuple[Sequence[int], Tensors]]) -> Tensors:
    """Return the outputs of all rows in order, from `(row indices, outputs of these rows)` of each part.

    Outputs that are shorter than others in a dimension after the first (their rows have fewer tokens) are
    filled up with zeros or empty texts. Raises Unjoinable if an output does not have a row for each index, or
    the ranks differ.
    """
    return {name: _join(pairs, _joined_shape(name, pairs)) for name, pairs in _by_output(parts).items()}


def joined_bytes(parts: Sequence[tuple[Sequence[int], Tensors]]) -> int:
    """Return the bytes of memory that the outputs of `join_rows` take; raises Unjoinable likewise."""
    return sum(
        math.prod(_joined_shape(name, pairs)) * pairs[0][1].itemsize
        for name, pairs in _by_output(parts).items()
    )


_RowsOfOutput = list[tuple[Sequence[int], Array]]
"""For one output: row indices, and the tensor with these rows."""


def _by_output(parts: Sequence[tuple[Sequence[int], Tensors]]) -> dict[str, _RowsOfOutput]:
    return {name: [(indices, outputs[name]) for indices, outputs in parts] for name in parts[0][1]}


def _joined_shape(name: str, pairs: _RowsOfOutput) -> tuple[int, ...]:
    for indices, tensor in pairs:
        if not isinstance(tensor, np.ndarray) or not tensor.ndim or len(tensor) != len(indices):
            got = (
                f"has shape {shape_text(tensor.shape)}" if isinstance(tensor, np.ndarray) else "is no tensor"
            )
            raise Unjoinable(f'output "{name}" {got} for {len(indices)} rows')
    tensors = [tensor for _, tensor in pairs]
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise Unjoinable(f'output "{name}" has different ranks')
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return (sum(map(len, tensors)), *sizes)


def _join(pairs: _RowsOfOutput, shape: tuple[int, ...]) -> Array:
    dtype = pairs[0][1].dtype
    joined = np.full(shape, "" if dtype.kind == "O" else 0, dtype)
    for indices, tensor in pairs:
        target: tuple[Any, ...] = (np.asarray(indices), *map(slice, tensor.shape[1:]))
        joined[target] = tensor
    return joined
