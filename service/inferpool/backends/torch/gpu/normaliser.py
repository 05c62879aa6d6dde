"""Pixels on a device, normalised there into the tensor that a model of PyTorch reads."""

from __future__ import annotations

from typing import Any

import torch

from inferpool.backends.torch.model import to_tensor
from inferpool.pixel_table import Normalisation


class TorchNormaliser:
    """The table of a `Normalisation` on a device.

    Attributes:
        normalisation: what it does.
    """

    def __init__(self, normalisation: Normalisation, datatype: str, device: Any) -> None:
        """`datatype` is that of the input."""
        self.normalisation = normalisation
        values = to_tensor(normalisation.values, datatype, copy=True)
        self._values = values.reshape(-1).to(device)
        # One table for all channels, one behind the other.
        starts = torch.arange(0, values.numel(), values.shape[1], dtype=torch.int32)
        self._channels_first = normalisation.layout == "CHW"
        self._starts = (starts.reshape(-1, 1, 1) if self._channels_first else starts).to(device)

    def run(self, pixels: Any, rows: Any) -> None:
        """Put `pixels`, normalised, into the first of `rows`, and zeros into the others.

        Both are on the device, `rows` contiguous. Raises what PyTorch raises.
        """
        ordered = pixels.permute(0, 3, 1, 2) if self._channels_first else pixels
        # A sum of its own accord would keep the order of the bytes that it was given.
        places = torch.empty(ordered.shape, dtype=torch.int32, device=rows.device)
        torch.add(ordered, self._starts, out=places)
        torch.index_select(self._values, 0, places.view(-1), out=rows[: len(pixels)].view(-1))
        rows[len(pixels) :].zero_()
