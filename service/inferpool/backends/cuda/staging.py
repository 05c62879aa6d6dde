"""Host buffers in which the rows of several requests are concatenated before the copy to a device."""

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
    """Memory for one input or output on the host and the device, for shapes of up to `nbytes` bytes."""

    nbytes: int = 0
    host: Array = field(default_factory=lambda: np.empty(0, np.uint8))
    address: int = 0

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """The host memory as an array of this dtype and shape."""
        return self.host[: dtype.itemsize * prod(shape)].view(dtype).reshape(shape)

    def grow(self, memory: Memory, nbytes: int) -> None:
        """Allocate new memory if the present memory is smaller. The old memory stays valid for its users."""
        if nbytes > self.nbytes:
            self.host, self.address = memory.host(nbytes), memory.device(nbytes)
            self.nbytes = nbytes


def stage(staged: Array, tensors: Sequence[Array]) -> int:
    """Concatenate the rows of `tensors` in `staged`, fill the rest with zeros and return the number of rows.

    If `staged` is a scalar, the first tensor is copied as it is and the result is 0.
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
