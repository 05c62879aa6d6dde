"""Whether pixels may be left to a model on a GPU to normalise, which is tried at load on every batch size.

It is also what makes the runtime grow its memory and load its kernels, so that no picture waits for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from inferpool.backends.base import DeviceModel
from inferpool.pixel_table import Normalisation
from inferpool.repository.load.batching_check import compare, first_line
from inferpool.repository.load.planner import rows_of
from inferpool.tensors import Array, Tensors

_PICTURES: Final = 4
"""Different pictures that are tried; a batch has them over and over."""


def try_pixels(
    model: DeviceModel, normalisation: Normalisation, sizes: Iterable[int], *, padded: bool
) -> str:
    """Hold pictures as pixels against the same, normalised here; returns why they must not be left, or "".

    `sizes` are those of batches, of which the last row is padding where they are `padded`.
    """
    if model.normalises is not True:
        return str(model.normalises)
    shape = (_PICTURES, normalisation.height, normalisation.width, normalisation.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    rows = normalisation.normalise(pixels)
    try:
        for size in sorted(sizes, reverse=True):
            count = max(1, size - 1) if padded else size
            wanted, got = (
                _run(model, normalisation, tensor, count, size if padded else None)
                for tensor in (rows, pixels)
            )
            fault, _ = compare(model.signature, got, wanted, range(count), model.rounding)
            if fault:
                return f"{fault} when {count} pictures are normalised on the GPU"
    except Exception as error:  # noqa: BLE001 - whatever it is, the CPU can
        return f"with pixels the model raised {first_line(error)!r}"
    return ""


def _run(
    model: DeviceModel, normalisation: Normalisation, tensor: Array, count: int, rung: int | None
) -> Tensors:
    batch = rows_of({normalisation.input: tensor}, count)
    return model.run(batch) if rung is None else model.run_padded([batch], rung)
