"""Outputs that are lists with a mapping for each row, as classifiers of scikit-learn have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.tensors import ANY, JSON, Array, Signature, Tensors


class NoTableError(ValueError):
    """An output that is no list with a mapping for each row, each with the same keys."""


class ListsAsTables(LoadedModel):
    """A model whose lists are read as tables of numbers, so that checks compare them like tensors.

    A row of such a table has a column for each key of the row's mapping.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.form = model.form
        self.max_rows = model.max_rows
        self.rounding = model.rounding
        self._model = model
        self._lists = frozenset(spec.name for spec in model.signature.outputs if spec.datatype == JSON)
        outputs = (
            replace(spec, datatype="FP32", shape=(ANY, ANY)) if spec.name in self._lists else spec
            for spec in model.signature.outputs
        )
        signature = model.signature
        self.signature = Signature(signature.inputs, tuple(outputs), signature.substitute_input)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the model; raises what it raises, and what `as_tables` raises."""
        return self.as_tables(self._model.run(inputs, outputs))

    def as_tables(self, found: Tensors) -> Tensors:
        """Return outputs of the model with tables for lists.

        Raises NoTableError for a list that is none, and ValueError for one that is none of numbers.
        """
        return {name: _table(name, value) if name in self._lists else value for name, value in found.items()}

    def close(self) -> None:
        """Leave the model as it is: its owner closes it."""


def has_lists(signature: Signature) -> bool:
    """Whether an output of the model is no tensor."""
    return any(spec.datatype == JSON for spec in signature.outputs)


def _table(name: str, value: Any) -> Array:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise NoTableError(f'output "{name}" is no list with a mapping for each row')
    keys = list(value[0]) if value else []
    if any(row.keys() != value[0].keys() for row in value):
        raise NoTableError(f'the mappings of output "{name}" have different keys')
    return np.array([[row[key] for key in keys] for row in value], np.float32).reshape(len(value), len(keys))
