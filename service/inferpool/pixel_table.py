"""The normalisation of pictures by a table: 8-bit pixels in, the model's numbers out.

A pixel has 256 possible values, so normalising it is a look-up in a table that was computed once. The codec
does this on the CPU, or the model does it on the GPU. Both use the same table and get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inferpool.tensors import ANY, Array, Tensors, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Normalisation:
    """How the pixels of one input are normalised.

    Pixels are UINT8 of shape `[rows, height, width, channels]`. The input itself has another datatype.

    Attributes:
        input: the name of the input.
        layout: the order of a row's dimensions in the model: `CHW`, `HWC` or `HW`.
        height: the height of every picture, in pixels.
        width: the width of every picture, in pixels.
        values: the number for each of the 256 pixel values, in the input's dtype: [channels, 256].
    """

    input: str
    layout: str
    height: int
    width: int
    values: Array

    @property
    def channels(self) -> int:
        """The number of channels: 1 for grey, 3 for colours."""
        return len(self.values)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row that the model takes."""
        sizes = {"C": self.channels, "H": self.height, "W": self.width}
        return tuple(sizes[axis] for axis in self.layout)

    @property
    def spec(self) -> TensorSpec:
        """The spec of the pixels, before normalisation."""
        return TensorSpec(self.input, "UINT8", (ANY, self.height, self.width, self.channels))

    def is_among(self, inputs: Tensors) -> bool:
        """Whether `inputs` contain pixels instead of normalised numbers."""
        tensor = inputs.get(self.input)
        return tensor is not None and tensor.dtype == np.uint8

    def normalise(self, pixels: Array) -> Array:
        """Normalise `pixels` to the rows that the model takes, C-contiguous."""
        shape = (len(pixels), *self.row_shape)
        if self.channels == 1:
            row: Array = self.values[0].take(pixels)
            return row.reshape(shape)
        rows = np.empty(shape, self.values.dtype)
        # `clip` changes nothing, because every index is in the table. The default mode would check and copy.
        if self.layout == "CHW":
            for channel, values in enumerate(self.values):
                values.take(pixels[..., channel], out=rows[:, channel], mode="clip")
        else:
            starts = np.arange(0, self.values.size, self.values.shape[1])
            self.values.reshape(-1).take(pixels + starts, out=rows, mode="clip")
        return rows


def run_shapes(
    parts: Sequence[Tensors], rows: int | None, normalisation: Normalisation | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a run's inputs that the model takes, with `rows` rows, or as many as the tensors have."""
    shapes = {
        name: tensor.shape if rows is None else (rows, *tensor.shape[1:]) for name, tensor in parts[0].items()
    }
    if normalisation is not None and normalisation.is_among(parts[0]):
        name = normalisation.input
        shapes[name] = (shapes[name][0], *normalisation.row_shape)
    return shapes
