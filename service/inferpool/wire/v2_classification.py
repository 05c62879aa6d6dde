"""Answers with the best classes of an output: Triton's classification extension of the protocol v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.tensors import Array, bf16_to_fp32

_MAX_CLASSIFIED: Final = 1_000_000
"""The most elements that are sorted for one classification, as in Triton."""


def classify(name: str, tensor: Array, datatype: str, wanted: int, labels: Sequence[str]) -> Array:
    """Return the `wanted` best classes of each row of the output `name`, as strings `value:index[:label]`.

    The best class is first; equal ones are in order of index. There may be fewer `labels` than classes.
    Raises InvalidInput if the output has no numbers, or too many.
    """
    if datatype in ("BOOL", "BYTES"):
        raise InvalidInput(f'output "{name}" is {datatype}; a classification takes numbers', tensor=name)
    numbers = bf16_to_fp32(tensor) if datatype == "BF16" else tensor
    rows = numbers.reshape(len(numbers), -1) if numbers.ndim > 1 and numbers.size else numbers.reshape(1, -1)
    if numbers.size > _MAX_CLASSIFIED:
        raise InvalidInput(
            f'output "{name}" has {numbers.size} elements; a classification takes {_MAX_CLASSIFIED}',
            tensor=name,
        )
    count = min(wanted, rows.shape[1])
    floats = numbers.dtype.kind == "f"
    classes: Array = np.empty((len(rows), count), dtype=np.object_)
    for row_number, row in enumerate(rows):
        best = np.argsort(-row if floats else ~row, kind="stable")[:count]
        for rank, index in enumerate(best.tolist()):
            # Triton prints floats with six digits after the point.
            value = f"{row[index]:f}" if floats else str(row[index])
            label = f":{labels[index]}" if index < len(labels) else ""
            classes[row_number, rank] = f"{value}:{index}{label}"
    return classes if numbers.ndim > 1 else classes.reshape(-1)
