"""An entry that runs in parts, each an entry of its own: one result is made of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from service.errors import InferpoolError, ModelFailed
from service.pool.ports import Entry, Result
from service.tensors import Array, Tensors, shape_text


class Unjoinable(Exception):
    """The outputs of an entry's parts do not fit together."""


class Whole:
    """The results of an entry's parts, until the last of them is there."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._missing = {part.entry.id: part for part in entry.parts}
        self._outputs: list[tuple[Sequence[int], Tensors]] = []
        self._queue_s = self._compute_s = 0.0

    def add(self, result: Result) -> Result | None:
        """Take the result of a part; returns the entry's own with the last, or with the first error."""
        part = self._missing.pop(result.entry_id)
        self._queue_s = max(self._queue_s, result.queue_s) if self._outputs else result.queue_s
        self._compute_s += result.compute_s
        error: InferpoolError | None = result.error
        outputs: Tensors | None = None
        if result.outputs is not None:
            self._outputs.append((part.places, result.outputs))
            if self._missing:
                return None
            try:
                outputs = join_rows(self._outputs)
            except Unjoinable as fault:
                error = ModelFailed(f"the rows' answers do not fit together: {fault}")
        return Result(self.entry.id, outputs, error, self._queue_s, self._compute_s, result.batch_rows)


def join_rows(parts: Sequence[tuple[Sequence[int], Tensors]]) -> Tensors:
    """The outputs of all rows in order, from those of some at a time: `(their numbers, their outputs)`.

    Where a row is shorter than another in some other dimension (it has fewer tokens) zeros follow, or empty
    texts. Raises Unjoinable where an output does not have the rows, or not the same rank.
    """
    return {
        name: _join_output(name, [(places, outputs[name]) for places, outputs in parts])
        for name in parts[0][1]
    }


def _join_output(name: str, parts: list[tuple[Sequence[int], Array]]) -> Array:
    for places, tensor in parts:
        if not isinstance(tensor, np.ndarray) or not tensor.ndim or len(tensor) != len(places):
            got = shape_text(tensor.shape) if isinstance(tensor, np.ndarray) else "no tensor"
            raise Unjoinable(f'output "{name}" is {got} for {len(places)} rows')
    tensors = [tensor for _, tensor in parts]
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise Unjoinable(f'output "{name}" has different ranks')
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    blank = "" if tensors[0].dtype.kind == "O" else 0
    joined = np.full((sum(map(len, tensors)), *sizes), blank, tensors[0].dtype)
    for places, tensor in parts:
        where: tuple[Any, ...] = (np.asarray(places), *map(slice, tensor.shape[1:]))
        joined[where] = tensor
    return joined
