"""Draws what each patch of a picture contributes: red for, blue against, over the picture in grey."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image

from inferpool.tensors import Array

LEAST_SIDE: Final = 224
"""Smaller pictures are drawn larger, a whole number of pixels for each."""
_FOR: Final = np.array([214, 39, 40], np.float64)
_AGAINST: Final = np.array([31, 119, 180], np.float64)
_STRONGEST: Final = 0.75
"""The share of the colour where the contribution is largest."""


def draw_heat_map(grey: Array, contributions: Array) -> bytes:
    """Return a PNG of the picture `grey`, in numbers of any range, under its `contributions`.

    Both are `[height, width]`: a contribution for each pixel.
    """
    low, span = float(grey.min()), float(np.ptp(grey))
    shade = (grey - low) / span if span > 0 else np.zeros(grey.shape)
    largest = float(np.abs(contributions).max()) or 1.0
    strength = (_STRONGEST * np.abs(contributions) / largest)[..., None]
    colour = np.where((contributions < 0)[..., None], _AGAINST, _FOR)
    pixels = (1 - strength) * (64 + 160 * shade[..., None]) + strength * colour
    times = max(1, -(-LEAST_SIDE // min(grey.shape)))
    image = Image.fromarray(pixels.astype(np.uint8)).resize(
        (times * grey.shape[1], times * grey.shape[0]), Image.Resampling.NEAREST
    )
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
