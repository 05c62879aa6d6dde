"""Normalises pixels on a device, into the tensor that a PyTorch model reads."""

from __future__ import annotations

from typing import Any

import torch

from inferpool.backends.torch.model import to_tensor
from inferpool.pixel_table import Normalisation


class TorchNormaliser:
    """The table of a `Normalisation` on a device.

    Attributes:
        normalisation: the table and the shapes.
    """

    def __init__(self, normalisation: Normalisation, datatype: str, device: Any) -> None:
        """`datatype` is the datatype of the input."""
        self.normalisation = normalisation
        values = to_tensor(normalisation.values, datatype, copy=True)
        self._values = values.reshape(-1).to(device)
        # The tables of all channels form one table, one after the other.
        starts = torch.arange(0, values.numel(), values.shape[1], dtype=torch.int32)
        self._channels_first = normalisation.layout == "CHW"
        self._starts = (starts.reshape(-1, 1, 1) if self._channels_first else starts).to(device)

    def run(self, pixels: Any, rows: Any) -> None:
        """Write the normalised `pixels` to the first rows of `rows`, and zeros to the others.

        Both are on the device; `rows` is contiguous. Raises what PyTorch raises.
        """
        ordered = pixels.permute(0, 3, 1, 2) if self._channels_first else pixels
        # Without `out`, the sum would keep the memory order of its permuted operand.
        indexes = torch.empty(ordered.shape, dtype=torch.int32, device=rows.device)
        torch.add(ordered, self._starts, out=indexes)
        torch.index_select(self._values, 0, indexes.view(-1), out=rows[: len(pixels)].view(-1))
        rows[len(pixels) :].zero_()
