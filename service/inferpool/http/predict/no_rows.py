"""Answers to requests without rows, which no model has to run for: some models end the process on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inferpool.tensors import ANY, DTYPES, JSON, Signature, Tensors, TensorSpec


class EmptyAnswers:
    """The outputs of one version for no rows."""

    def __init__(self, signature: Signature, token_axes: Mapping[str, Sequence[int]], ids: str) -> None:
        """`token_axes` are the axes of outputs that count tokens, as the second axis of the input `ids`."""
        self._signature = signature
        self._token_axes = token_axes
        self._ids = ids

    def outputs(self, inputs: Tensors, wanted: Sequence[str] | None) -> Tensors:
        """Return the outputs that the model has for no rows; `wanted` names them, None means all.

        A dimension that the signature leaves open has the size of the input's dimension of that name, or 0.
        """
        specs = self._signature.outputs_by_name
        answer: dict[str, Any] = {}
        for name in specs if wanted is None else wanted:
            spec = specs[name]
            if spec.datatype == JSON:
                answer[name] = []
            else:
                answer[name] = np.empty(self._shape(spec, inputs), DTYPES[spec.datatype])
        return answer

    def _shape(self, spec: TensorSpec, inputs: Tensors) -> tuple[int, ...]:
        sizes = list(spec.shape or (ANY,))
        sizes[0] = 0
        for axis, size in enumerate(sizes):
            if axis and size == ANY:
                sizes[axis] = self._open_size(spec, axis, inputs)
        return tuple(sizes)

    def _open_size(self, spec: TensorSpec, axis: int, inputs: Tensors) -> int:
        if axis in self._token_axes.get(spec.name, ()) and self._ids in inputs:
            return int(inputs[self._ids].shape[1])
        symbol = spec.symbols[axis] if axis < len(spec.symbols) else ""
        for other in self._signature.inputs:
            if symbol and symbol in other.symbols and other.name in inputs:
                return int(inputs[other.name].shape[other.symbols.index(symbol)])
        return 0


def has_rows(signature: Signature, batched: bool) -> bool:
    """Whether every output has a row for each row of the inputs, as far as the signature tells.

    That is proven if the version is `batched`. Else the first dimension of all inputs and outputs is open.
    """
    if batched:
        return True
    specs = [*signature.inputs, *signature.outputs]
    return all(
        spec.optional or (spec.datatype != JSON and spec.shape is not None and spec.shape[:1] == (ANY,))
        for spec in specs
    )
