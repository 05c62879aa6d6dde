"""Inputs made up from a signature, with a fixed seed, for models that come without golden samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from inferpool.tensors import ANY, Array, Tensors, TensorSpec, fp32_to_bf16

SEED: Final = 20_260_101

_SIZES: Final = ((16, 24), (224, 256), (64, 96), (1, 2), (3, 4), (32, 48), (128, 160))
"""Sizes for dimensions of any size other than the rows, tried in turn. The second number is the size in the
second input of a pair: a dimension of an output that differs between the two is of any size."""

_INTEGERS: Final = (9, 2, 1)
"""The largest integers, tried in turn: token ids need variety, masks and flags need 0 and 1."""

_WORDS: Final = ("a", "b", "c", "row", "text", "x1", "0", "model")


def made_up_rows(specs: Sequence[TensorSpec], rows: int) -> Iterator[Tensors]:
    """Inputs of `rows` rows for every spec, one attempt after the other; optional inputs are left out.

    The first dimension always has `rows` rows, even if the signature fixes another size.
    """
    rng = np.random.default_rng(SEED)
    required = _required(specs)
    for size, _ in _sizes(required):
        for largest in _largest(required):
            yield {spec.name: _tensor(spec, _row_shape(spec, rows, size), largest, rng) for spec in required}


def made_up_pairs(specs: Sequence[TensorSpec]) -> Iterator[tuple[Tensors, Tensors]]:
    """Pairs of inputs that differ in every size that may differ; optional inputs are left out.

    The first input of a pair has two rows, the second has three.
    """
    rng = np.random.default_rng(SEED)
    required = _required(specs)
    free = _has_free_sizes(required)
    for sizes in _sizes(required):
        for largest in _largest(required):
            for other in sizes[::-1] if free else sizes[:1]:
                yield (
                    {spec.name: _tensor(spec, _shape(spec, 2, sizes[0]), largest, rng) for spec in required},
                    {spec.name: _tensor(spec, _shape(spec, 3, other), largest, rng) for spec in required},
                )


def _required(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [spec for spec in specs if not spec.optional]


def _has_free_sizes(specs: Sequence[TensorSpec]) -> bool:
    return any(size == ANY for spec in specs for size in (spec.shape or ())[1:])


def _sizes(specs: Sequence[TensorSpec]) -> tuple[tuple[int, int], ...]:
    return _SIZES if _has_free_sizes(specs) else _SIZES[:1]


def _largest(specs: Sequence[TensorSpec]) -> tuple[int, ...]:
    integers = any(spec.datatype.lstrip("U").startswith("INT") for spec in specs)
    return _INTEGERS if integers else _INTEGERS[:1]


def _row_shape(spec: TensorSpec, rows: int, size: int) -> tuple[int, ...]:
    return (rows, *(size if length == ANY else length for length in (spec.shape or (ANY,))[1:]))


def _shape(spec: TensorSpec, rows: int, size: int) -> tuple[int, ...]:
    return tuple(
        length if length != ANY else size if index else rows for index, length in enumerate(spec.shape or ())
    )


def _tensor(spec: TensorSpec, shape: tuple[int, ...], largest: int, rng: np.random.Generator) -> Array:
    if spec.datatype == "BYTES":
        return np.array(_WORDS, dtype=object)[rng.integers(0, len(_WORDS), shape)]
    if spec.datatype == "BF16":
        return fp32_to_bf16(rng.standard_normal(shape).astype(np.float32))
    if spec.dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape), spec.dtype)
    return np.asarray(rng.integers(0, 2 if spec.dtype.kind == "b" else largest + 1, shape), spec.dtype)
