"""Whether a model on a GPU may normalise pixels itself: tried at load on every batch size.

The runs also make the runtime grow its memory and load its kernels, so that no picture waits for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from inferpool.backends.base import DeviceModel
from inferpool.errors import Reason, short_reason
from inferpool.pixel_table import Normalisation
from inferpool.repository.load.comparison import compare_outputs
from inferpool.repository.load.runnable_rows import repeat_rows
from inferpool.tensors import Array, Tensors

_PICTURES: Final = 4
"""The number of different pictures; a batch repeats them."""


def check_pixels(
    model: DeviceModel, normalisation: Normalisation, sizes: Iterable[int], *, padded: bool
) -> Reason | None:
    """Compare pictures as pixels with the same pictures normalised here; returns why they differ.

    `sizes` are the batch sizes to try. With `padded`, the last row of each batch is padding.
    """
    if not model.takes_pixels.ok:
        return model.takes_pixels.reason
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
            fault, _ = compare_outputs(model.signature, got, wanted, range(count), model.rounding)
            if fault is not None:
                return f"{fault} when {count} pictures are normalised on the GPU"
    except Exception as error:  # noqa: BLE001 - whatever the model raises, the CPU can normalise
        return f"with pixels the model raised {short_reason(error)!r}"
    return None


def _run(
    model: DeviceModel, normalisation: Normalisation, tensor: Array, count: int, bucket: int | None
) -> Tensors:
    batch = repeat_rows({normalisation.input: tensor}, count)
    return model.run(batch) if bucket is None else model.run_padded([batch], bucket)
