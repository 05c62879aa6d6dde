"""An entry that runs in parts, each an entry of its own: one result is made of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inferpool.errors import InferpoolError, InvalidInput, ModelFailed
from inferpool.pool.ports import Entry, Result
from inferpool.tensors import Array, Tensors, shape_text


class Unjoinable(Exception):
    """The outputs of an entry's parts do not fit together."""


class Whole:
    """The results of an entry's parts, until the last of them is there; `over` is set when it has its own."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.over = False
        self._missing = {part.entry.id: part for part in entry.parts}
        self._outputs: list[tuple[Sequence[int], Tensors]] = []
        self._queue_s = self._compute_s = 0.0

    def add(self, result: Result) -> bool:
        """Take the result of a part; True with the last, or the first error: then `end` is to follow."""
        part = self._missing.pop(result.entry_id)
        self._queue_s = max(self._queue_s, result.queue_s) if self._outputs else result.queue_s
        self._compute_s += result.compute_s
        if result.outputs is None:
            return True
        self._outputs.append((part.places, result.outputs))
        return not self._missing

    def end(self, last: Result, most_bytes: float = math.inf) -> Result:
        """The entry's own result, `last` being the one that `add` was told of last.

        It may take a while, so that nobody else should have to wait for it. An answer of more than
        `most_bytes` is an InvalidInput: it grows with the longest row, which the caller chose.
        """
        outputs: Tensors | None = None
        error = last.error
        if last.outputs is not None:
            try:
                size = joined_bytes(self._outputs)
                if size > most_bytes:
                    error = InvalidInput(
                        f"the answer takes {size} bytes with every row as long as the longest, more than the"
                        f" {most_bytes:.0f} that it may; send fewer rows at a time, or ask for fewer outputs",
                        expected=most_bytes,
                        got=size,
                    )
                else:
                    outputs = join_rows(self._outputs)
            except Unjoinable as fault:
                error = ModelFailed(f"the rows' answers do not fit together: {fault}")
            except Exception as fault:  # noqa: BLE001 - memory may run out; the entry ends all the same
                error = _failed(fault)
        return Result(self.entry.id, outputs, error, self._queue_s, self._compute_s, last.batch_rows)


def _failed(fault: Exception) -> InferpoolError:
    failure = ModelFailed("the rows' answers could not be joined")
    failure.__cause__ = fault
    return failure


def join_rows(parts: Sequence[tuple[Sequence[int], Tensors]]) -> Tensors:
    """The outputs of all rows in order, from those of some at a time: `(their numbers, their outputs)`.

    Where a row is shorter than another in some other dimension (it has fewer tokens) zeros follow, or empty
    texts. Raises Unjoinable where an output does not have the rows, or not the same rank.
    """
    return {
        name: _join_output(pieces, _joined_shape(name, pieces)) for name, pieces in _by_output(parts).items()
    }


def joined_bytes(parts: Sequence[tuple[Sequence[int], Tensors]]) -> int:
    """What `join_rows` would take in memory, in bytes; raises Unjoinable as it does."""
    return sum(
        math.prod(_joined_shape(name, pieces)) * pieces[0][1].itemsize
        for name, pieces in _by_output(parts).items()
    )


_Pieces = list[tuple[Sequence[int], Array]]
"""Some rows of one output each, with the numbers of these rows."""


def _by_output(parts: Sequence[tuple[Sequence[int], Tensors]]) -> dict[str, _Pieces]:
    return {name: [(places, outputs[name]) for places, outputs in parts] for name in parts[0][1]}


def _joined_shape(name: str, pieces: _Pieces) -> tuple[int, ...]:
    for places, tensor in pieces:
        if not isinstance(tensor, np.ndarray) or not tensor.ndim or len(tensor) != len(places):
            got = shape_text(tensor.shape) if isinstance(tensor, np.ndarray) else "no tensor"
            raise Unjoinable(f'output "{name}" is {got} for {len(places)} rows')
    tensors = [tensor for _, tensor in pieces]
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise Unjoinable(f'output "{name}" has different ranks')
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return (sum(map(len, tensors)), *sizes)


def _join_output(pieces: _Pieces, shape: tuple[int, ...]) -> Array:
    dtype = pieces[0][1].dtype
    joined = np.full(shape, "" if dtype.kind == "O" else 0, dtype)
    for places, tensor in pieces:
        where: tuple[Any, ...] = (np.asarray(places), *map(slice, tensor.shape[1:]))
        joined[where] = tensor
    return joined
