"""Sizes that a model leaves open, other than its rows: heights, widths, lengths.

Requests of other sizes are made from one that the model is known to take, so that the values in them stay the
same: indices of a vocabulary, flags, numbers of the right range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.backends.made_up_inputs import made_up_pairs
from inferpool.tensors import ANY, Signature, Tensors

Axis: TypeAlias = tuple[str, int]
"""An input and one of its dimensions."""

MOST_BYTES: Final = 16 * 1024 * 1024
"""Bytes up to which the inputs, and the outputs, of a made-up request may grow. Runtimes keep the memory of
their largest run, which is some multiple of these bytes."""


def free_axes(signature: Signature, request: Tensors, first: int) -> list[tuple[Axis, ...]]:
    """Return the open dimensions of a request's inputs, from dimension `first` on.

    Dimensions with one name stand together, because the model may need them equal.
    """
    found: dict[str, list[Axis]] = {}
    for spec in signature.inputs:
        if spec.name not in request or spec.shape is None:
            continue
        for axis, size in enumerate(spec.shape):
            if axis >= first and size == ANY:
                symbol = spec.symbols[axis] if spec.symbols else ""
                found.setdefault(symbol or f"{spec.name}.{axis}", []).append((spec.name, axis))
    return [tuple(axes) for axes in found.values()]


def resized(request: Tensors, sizes: Mapping[Axis, int]) -> Tensors:
    """Return a request with other sizes, whose content is that of `request`, repeated or cut off."""
    result = dict(request)
    for (name, axis), size in sizes.items():
        tensor = result[name]
        result[name] = np.take(tensor, np.arange(size) % max(1, tensor.shape[axis]), axis)
    return result


def scaled_sizes(request: Tensors, axes: Sequence[tuple[Axis, ...]], factor: float) -> dict[Axis, int]:
    """Return `factor` times the sizes that a request has in some dimensions; at least 1."""
    return {
        (name, axis): max(1, round(request[name].shape[axis] * factor))
        for alike in axes
        for name, axis in alike
    }


def bytes_of(tensors: Mapping[str, object]) -> int:
    """Return the bytes of arrays; what is no array counts nothing."""
    return sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, np.ndarray))


def made_up_request(model: LoadedModel) -> Tensors:
    """Return a request that `model` takes, whose rows need not be known; empty if none was found."""
    for request, _ in made_up_pairs(model.signature.inputs):
        try:
            model.run(request)
        except Exception:  # noqa: BLE001 - made-up inputs may be nonsense to the model
            continue
        return request
    return {}


def runs_with(model: LoadedModel, request: Tensors) -> bool:
    """Whether the model takes a request."""
    try:
        model.run(request)
    except Exception:  # noqa: BLE001 - models raise anything
        return False
    return True


def other_sizes(size: int) -> Iterator[int]:
    """Return sizes that differ from `size`, to be tried in turn."""
    yield from (2 * size, size + 1)
    if size > 1:
        yield 1
