"""Columns of one value a row, and rows that are objects, as tensors. The values are those of a JSON parser.

This module is not compiled: its loops over rows let other threads run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferpool.errors import InvalidInput
from inferpool.tensors import ANY, Array, TensorSpec, name_text, value_text
from inferpool.wire.nested_lists import completed, read_nested


def transpose(rows: list[Any], field: str, known: Mapping[str, TensorSpec]) -> dict[str, list[Any]]:
    """Return the values of each name in a list of objects, one a row; None where a row lacks a name.

    The first row has all names but those of `known` inputs, which later rows may add. Raises InvalidInput.
    """
    names: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InvalidInput(
                f'"{field}" at [{index}] is {value_text(row)}; it takes an object, as the first row is',
                field=field,
                index=[index],
            )
        if row.keys() == names.keys():
            continue
        for name in row:
            if name not in names:
                if index and name not in known:
                    raise InvalidInput(
                        f'"{field}" at [{index}] has {name_text(name)}, which the first row lacks',
                        field=field,
                        index=[index],
                    )
                names[name] = None
    return {name: [row.get(name) for row in rows] for name in names}


def column_tensor(spec: TensorSpec, values: list[Any]) -> Array:
    """Return one value a row as a tensor; null is NaN in an input of floating-point numbers.

    The caller checks the shape. Raises InvalidInput with the row and the value at fault.
    """
    tensor = read_nested(spec, values)
    return as_column(spec, tensor if tensor.size else completed(spec, tensor))


def as_column(spec: TensorSpec, tensor: Array) -> Array:
    """Return a tensor of shape `[n]` as `[n, 1]` if the model takes one value a row in that shape."""
    shape = spec.shape
    if shape is not None and tensor.ndim == 1 and len(shape) > 1 and set(shape[1:]) <= {1, ANY}:
        return tensor.reshape(-1, *[1] * (len(shape) - 1))
    return tensor
