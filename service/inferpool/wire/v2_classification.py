"""Answers with the best classes of an output: Triton's classification extension of the protocol v2.

Beside the event loop, strings are made in pieces, so that other threads can run meanwhile. This module is not
compiled: compiled loops do not let other threads run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.system.cpu_pace import let_others_run
from inferpool.tensors import Array, bf16_to_fp32

_MAX_CLASSIFIED: Final = 1_000_000
"""The most elements that are sorted for one classification, as in Triton."""
_PIECE_STRINGS: Final = 2048
"""Strings that are made at a time; they take about a millisecond."""


def classify(
    name: str,
    tensor: Array,
    datatype: str,
    wanted: int,
    labels: Sequence[str],
    after_piece: Callable[[], None] | None = None,
) -> Array:
    """Return the `wanted` best classes of each row of the output `name`, as strings `value:index[:label]`.

    The best class is first; equal ones are in order of index. There may be fewer `labels` than classes.
    `after_piece` is called between pieces of many strings.
    Raises InvalidInput if the output has no numbers, or too many.
    """
    if datatype in ("BOOL", "BYTES"):
        raise InvalidInput(f'output "{name}" is {datatype}; a classification takes numbers', tensor=name)
    numbers = bf16_to_fp32(tensor) if datatype == "BF16" else tensor
    # Not -1 for the classes, which numpy cannot tell if there are no rows.
    shape = (len(numbers), math.prod(numbers.shape[1:])) if numbers.ndim > 1 else (1, numbers.size)
    rows = numbers.reshape(shape)
    if numbers.size > _MAX_CLASSIFIED:
        raise InvalidInput(
            f'output "{name}" has {numbers.size} elements; a classification takes {_MAX_CLASSIFIED}',
            tensor=name,
        )
    count = min(wanted, rows.shape[1])
    floats = numbers.dtype.kind == "f"
    best = np.argsort(-rows if floats else ~rows, axis=1, kind="stable")[:, :count].reshape(-1)
    values = rows[np.repeat(np.arange(len(rows)), count), best]
    endings = [f":{label}" for label in labels[: rows.shape[1]]]
    endings += [""] * (rows.shape[1] - len(endings))
    classes: Array = np.empty(len(best), dtype=np.object_)
    for start in range(0, len(best), _PIECE_STRINGS):
        if start and after_piece is not None:
            after_piece()
        piece = slice(start, start + _PIECE_STRINGS)
        pairs = zip(values[piece].tolist(), best[piece].tolist(), strict=True)
        # Triton prints floats with six digits after the point.
        classes[piece] = (
            [f"{value:f}:{index}{endings[index]}" for value, index in pairs]
            if floats
            else [f"{value}:{index}{endings[index]}" for value, index in pairs]
        )
    return classes.reshape(len(rows), count) if numbers.ndim > 1 else classes


def empty_in_pieces(strings: Array) -> None:
    """Take the elements out of an array of strings: to free many at once would hold the GIL."""
    flat = strings.reshape(-1)
    for start in range(0, len(flat), _PIECE_STRINGS):
        if start:
            let_others_run()
        flat[start : start + _PIECE_STRINGS] = None
