"""Inputs made up from a signature, with a fixed seed, for models that come without golden samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np

from inferpool.tensors import ANY, Array, Tensors, TensorSpec, element_count, fp32_to_bf16

SEED: Final = 20_260_101

_Sizes: TypeAlias = tuple[int, int, int | None, int]
"""The size of dimensions of any size other than the rows; the same for the second input of a pair; the
number of channels and their axis, in tensors with at least two more such dimensions (None: no channels)."""

_SIZES: Final[tuple[_Sizes, ...]] = (
    *((size, other, None, 0) for size, other in ((16, 24), (224, 256), (64, 96), (1, 2), (3, 4), (32, 48))),
    (128, 160, None, 0),
    # Networks for sound take hundreds of samples at least, or a second.
    (1600, 2400, None, 0),
    (16_000, 24_000, None, 0),
    *(
        (size, other, count, axis)
        for size, other in ((32, 48), (224, 256))
        for axis in (1, -1)
        for count in (3, 1)
    ),
)
"""Sizes that are tried in turn. A dimension of an output that differs between the two inputs of a pair is of
any size."""

_MOST_BYTES: Final = 64 << 20
"""Sizes for which an attempt would take more memory are left out."""
_LEAST_ROWS: Final = 2
_MOST_FIXED_BYTES: Final = 1 << 30
"""The same for `_LEAST_ROWS` rows of a model whose sizes are fixed."""

_INTEGERS: Final = (9, 2, 1)
"""The largest integers, tried in turn: token ids need variety, masks and flags need 0 and 1."""

_WORDS: Final = ("a", "b", "c", "row", "text", "x1", "0", "model")


def made_up_rows(specs: Sequence[TensorSpec], rows: int) -> Iterator[Tensors]:
    """Inputs of `rows` rows for every spec, one attempt after the other; optional inputs are left out.

    The first dimension always has `rows` rows, even if the signature fixes another size; fewer if they would
    take too much memory.
    """
    rng = np.random.default_rng(SEED)
    required = _required(specs)
    for sizes in _sizes(required):
        shapes = [_shape(spec, 1, sizes) for spec in required]
        count = _affordable(required, shapes, rows)
        if not count:
            continue
        for largest in _largest(required):
            yield {
                spec.name: _tensor(spec, (count, *shape[1:]), largest, rng)
                for spec, shape in zip(required, shapes, strict=True)
            }


def made_up_pairs(specs: Sequence[TensorSpec]) -> Iterator[tuple[Tensors, Tensors]]:
    """Pairs of inputs that differ in every size that may differ; optional inputs are left out.

    The first input of a pair has two rows, the second has three.
    """
    rng = np.random.default_rng(SEED)
    required = _required(specs)
    free = _has_free_sizes(required)
    for sizes in _sizes(required):
        first, other, channels, axis = sizes
        larger = (other, first, channels, axis)
        if not _affordable(required, [_shape(spec, 3, larger) for spec in required], 1):
            continue
        for largest in _largest(required):
            for second in (larger, sizes) if free else (sizes,):
                yield (
                    {spec.name: _tensor(spec, _shape(spec, 2, sizes), largest, rng) for spec in required},
                    {spec.name: _tensor(spec, _shape(spec, 3, second), largest, rng) for spec in required},
                )


def _required(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [spec for spec in specs if not spec.optional]


def _has_free_sizes(specs: Sequence[TensorSpec]) -> bool:
    return any(size == ANY for spec in specs for size in (spec.shape or ())[1:])


def _sizes(specs: Sequence[TensorSpec]) -> tuple[_Sizes, ...]:
    if not _has_free_sizes(specs):
        return _SIZES[:1]
    # Channels are told apart only where they lie beside two dimensions of a picture.
    pictures = any((spec.shape or ())[1:].count(ANY) > 2 for spec in specs)
    return tuple(sizes for sizes in _SIZES if pictures or sizes[2] is None)


def _affordable(specs: Sequence[TensorSpec], shapes: Sequence[tuple[int, ...]], rows: int) -> int:
    """How many times `shapes` the memory allows, at most `rows`; 0 if not even a few.

    A text counts as a pointer; numbers are made as FP64.
    """
    size = 8 * sum(element_count(shape) for shape in shapes)
    least = min(rows, _LEAST_ROWS)
    count = max(least, min(rows, _MOST_BYTES // max(1, size)))
    return count if count * size <= (_MOST_BYTES if _has_free_sizes(specs) else _MOST_FIXED_BYTES) else 0


def _largest(specs: Sequence[TensorSpec]) -> tuple[int, ...]:
    integers = any(spec.datatype.lstrip("U").startswith("INT") for spec in specs)
    return _INTEGERS if integers else _INTEGERS[:1]


def _shape(spec: TensorSpec, rows: int, sizes: _Sizes) -> tuple[int, ...]:
    """The shape of one attempt: `rows` rows unless their number is fixed."""
    size, _, channels, channel_axis = sizes
    shape = spec.shape if spec.shape is not None else (ANY,)
    free = [axis for axis in range(1, len(shape)) if shape[axis] == ANY]
    filled = [rows if length == ANY and not axis else length for axis, length in enumerate(shape)]
    for axis in free:
        filled[axis] = size
    if channels is not None and len(free) > 2 and channel_axis % len(shape) in free:
        filled[channel_axis] = channels
    return tuple(filled)


def _tensor(spec: TensorSpec, shape: tuple[int, ...], largest: int, rng: np.random.Generator) -> Array:
    if spec.datatype == "BYTES":
        return np.array(_WORDS, dtype=object)[rng.integers(0, len(_WORDS), shape)]
    if spec.datatype == "BF16":
        return fp32_to_bf16(rng.standard_normal(shape).astype(np.float32))
    if spec.dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape), spec.dtype)
    return np.asarray(rng.integers(0, 2 if spec.dtype.kind == "b" else largest + 1, shape), spec.dtype)
