"""Rows on their way to a device: put below one another where it copies them from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from inferpool.backends.cuda.memory import Memory
from inferpool.tensors import Array


@dataclass(slots=True)
class Buffer:
    """Memory of an input or output, on both sides, for shapes of up to `nbytes` bytes."""

    nbytes: int = 0
    host: Array = field(default_factory=lambda: np.empty(0, np.uint8))
    address: int = 0

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """The host's side as an array."""
        return self.host[: dtype.itemsize * prod(shape)].view(dtype).reshape(shape)

    def grow(self, memory: Memory, nbytes: int) -> None:
        """Have other, larger memory where this is too small; what uses the old may go on."""
        if nbytes > self.nbytes:
            self.host, self.address = memory.host(nbytes), memory.device(nbytes)
            self.nbytes = nbytes


def stage(staged: Array, tensors: Sequence[Array]) -> int:
    """Put the rows of `tensors` below one another into `staged`, and zeros after them; returns their number.

    The one tensor of a `staged` without dimensions is put there as it is.
    """
    if not staged.ndim:
        staged[...] = tensors[0]
        return 0
    start = 0
    for tensor in tensors:
        stop = start + len(tensor)
        staged[start:stop] = tensor
        start = stop
    staged[start:] = 0
    return start
