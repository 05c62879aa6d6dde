"""Answers with the best classes of an output: Triton's classification extension of the protocol v2."""

from __future__ import annotations

import math
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
    values = rows[np.repeat(np.arange(len(rows)), count), best].tolist()
    # Triton prints floats with six digits after the point.
    texts = (
        [f"{value:f}:{index}" for value, index in zip(values, best.tolist(), strict=True)]
        if floats
        else [f"{value}:{index}" for value, index in zip(values, best.tolist(), strict=True)]
    )
    if labels:
        endings = [f":{label}" for label in labels[: rows.shape[1]]]
        endings += [""] * (rows.shape[1] - len(endings))
        texts = [text + endings[index] for text, index in zip(texts, best.tolist(), strict=True)]
    classes: Array = np.empty(len(texts), dtype=np.object_)
    classes[:] = texts
    return classes.reshape(len(rows), count) if numbers.ndim > 1 else classes
