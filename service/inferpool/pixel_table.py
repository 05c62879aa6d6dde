"""Pictures on their way into a model: pixels of 8 bits, and the number that each value of a pixel becomes.

There are but 256 values, so that normalising a pixel is looking it up in a table, which was computed once.
The codec does so on the CPU, a model on a GPU does it there, by the same table: both get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inferpool.tensors import ANY, Array, Tensors, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Normalisation:
    """How the pixels of one input are normalised.

    Pixels are rows of UINT8, `[rows, height, width, channels]`; what the input takes is another datatype.

    Attributes:
        input: its name.
        layout: the order of a row's dimensions in the model: `CHW`, `HWC` or `HW`.
        height: of every picture, in pixels, and `width` likewise.
        values: what each of the 256 values becomes, in the input's dtype: [channels, 256].
    """

    input: str
    layout: str
    height: int
    width: int
    values: Array

    @property
    def channels(self) -> int:
        """One for grey, three for colours."""
        return len(self.values)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row as the model takes it."""
        sizes = {"C": self.channels, "H": self.height, "W": self.width}
        return tuple(sizes[axis] for axis in self.layout)

    @property
    def spec(self) -> TensorSpec:
        """What the input looks like before."""
        return TensorSpec(self.input, "UINT8", (ANY, self.height, self.width, self.channels))

    def is_among(self, inputs: Tensors) -> bool:
        """Whether `inputs` have pixels, and not numbers that have been normalised."""
        tensor = inputs.get(self.input)
        return tensor is not None and tensor.dtype == np.uint8

    def normalise(self, pixels: Array) -> Array:
        """The rows that the model takes of `pixels`, C-contiguous."""
        shape = (len(pixels), *self.row_shape)
        if self.channels == 1:
            row: Array = self.values[0].take(pixels)
            return row.reshape(shape)
        rows = np.empty(shape, self.values.dtype)
        # No place can be beyond a table of all values, but numpy would look, through a copy of what it gives.
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
    """The shapes of a run's inputs as the model takes them: of the rows that come, or of so many."""
    shapes = {
        name: tensor.shape if rows is None else (rows, *tensor.shape[1:]) for name, tensor in parts[0].items()
    }
    if normalisation is not None and normalisation.is_among(parts[0]):
        name = normalisation.input
        shapes[name] = (shapes[name][0], *normalisation.row_shape)
    return shapes
