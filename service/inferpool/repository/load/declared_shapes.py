"""Declared shapes that runs show to be wrong.

Exporters give one name to dimensions that need not be equal, and declare outputs with the sizes of the
example that was exported. A runtime takes such models as they are, so names and sizes are believed only as
far as runs agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.repository.load.free_sizes import Axis, other_sizes, resized, runs_with
from inferpool.tensors import ANY, JSON, Signature, Tensors, TensorSpec

Shape: TypeAlias = tuple[int, ...]


class ShapeCorrections(NamedTuple):
    """The changes that a signature needs.

    Attributes:
        free_names: names of dimensions that need not be equal.
        outputs: the shapes of outputs that are not as declared, by name; None is any rank.
    """

    free_names: tuple[str, ...] = ()
    outputs: tuple[tuple[str, Shape | None], ...] = ()


NO_CORRECTIONS: Final = ShapeCorrections()


def free_names(model: LoadedModel, request: Tensors, *, batched: bool) -> tuple[str, ...]:
    """Return the names of dimensions of inputs that the model takes though their sizes differ.

    `request` is one that the model takes; without one, no name is believed. The rows of a batched model are
    equal in any case.
    """
    found = []
    for name, axes in model.signature.shared_symbols.items():
        present = [axis for axis in axes if axis[0] in request]
        rows_alone = batched and all(axis == 0 for _, axis in present)
        if not rows_alone and (len(present) < 2 or _may_differ(model, request, present)):
            found.append(name)
    return tuple(found)


def _may_differ(model: LoadedModel, request: Tensors, axes: Sequence[Axis]) -> bool:
    first, last = axes[0], axes[-1]
    size = request[first[0]].shape[first[1]]
    if any(request[name].shape[axis] != size for name, axis in axes):
        return True  # the request itself shows it
    return any(
        runs_with(model, resized(request, {one: other}))
        for one in (last, first)
        for other in other_sizes(size)
    )


def output_corrections(
    signature: Signature, runs: Iterable[Tensors], *, batched: bool
) -> tuple[tuple[str, Shape | None], ...]:
    """Return the shapes of outputs that are not as declared, by the outputs of some runs.

    The first dimension of a batched model's outputs counts rows.
    """
    found: dict[str, Shape | None] = {}
    for outputs in runs:
        for spec in signature.outputs:
            value = outputs.get(spec.name)
            if spec.datatype == JSON or not isinstance(value, np.ndarray):
                continue
            known = found.get(spec.name, spec.shape)
            if known is None:
                continue
            if batched and known and known[0] != ANY:
                known = (ANY, *known[1:])
            if len(known) != value.ndim:
                known = (ANY,) * value.ndim if spec.name not in found else None
            else:
                known = tuple(
                    want if want in (ANY, got) else ANY for want, got in zip(known, value.shape, strict=True)
                )
            if known != found.get(spec.name, spec.shape):
                found[spec.name] = known
    return tuple(found.items())


def without_names(signature: Signature, names: Iterable[str] | None = None) -> Signature:
    """Return a signature in which dimensions with these names may differ; by default all dimensions."""
    free = frozenset(signature.shared_symbols if names is None else names)
    if not free:
        return signature
    inputs = tuple(_without(spec, free) for spec in signature.inputs)
    return Signature(inputs, signature.outputs, signature.substitute_input)


def corrected(signature: Signature, corrections: ShapeCorrections) -> Signature:
    """Return a signature with corrections; those of tensors that it does not have are left out."""
    signature = without_names(signature, corrections.free_names)
    shapes = dict(corrections.outputs)
    if not shapes:
        return signature
    outputs = tuple(
        replace(spec, shape=shapes[spec.name]) if spec.name in shapes else spec for spec in signature.outputs
    )
    return Signature(signature.inputs, outputs, signature.substitute_input)


def _without(spec: TensorSpec, names: frozenset[str]) -> TensorSpec:
    if names.isdisjoint(spec.symbols):
        return spec
    symbols = tuple("" if symbol in names else symbol for symbol in spec.symbols)
    return replace(spec, symbols=symbols if any(symbols) else ())
