"""Rows on their way to a device: put below one another where it copies them from."""

from __future__ import annotations

from collections.abc import Sequence

from service.tensors import Array


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
