"""Tables as data frames have them: named columns of one value a row, which become the inputs of a model.

A column is the input of its name; one value a row stands for the shapes `[n]` and `[n, 1]` alike. A model
with a single input takes the columns in their order instead, if none of them has its name: they are the
features of a row. A missing value is NaN in an input of floating-point numbers, and an error in every
other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from inferpool.allowance import Allowance
from inferpool.errors import InvalidInput
from inferpool.tensors import (
    ANY,
    MOST_ROWS,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    check_inputs,
    name_text,
    names_text,
    unknown_input,
    value_text,
)
from inferpool.wire.columns import as_column, column_tensor, transpose
from inferpool.wire.json_bodies import wrong_field

_RECORDS: Final = ("dataframe_records", "records")
_SPLIT: Final = ("dataframe_split", "split")
_SPLIT_FIELDS: Final = ("columns", "data", "index")
_CELL_BYTES: Final = 16
"""Bytes that a value takes in a column beside its object: a reference, and its place in a list."""


class Column(ABC):
    """The values of one column."""

    @abstractmethod
    def tensor(self, spec: TensorSpec) -> Array:
        """The values in the datatype of `spec`, `[n]` or `[n, …]`.

        Raises InvalidInput with the row at fault.
        """


class ListColumn(Column):
    """Values as a JSON parser gives them."""

    def __init__(self, values: list[Any]) -> None:
        """Keep `values`, one a row, None where one is missing."""
        self._values = values

    def tensor(self, spec: TensorSpec) -> Array:
        """The values as a tensor; see `column_tensor`."""
        return column_tensor(spec, self._values)


class Table:
    """A table with columns of the same length.

    Attributes:
        columns: by name, in their order; the names are empty texts with a number if there are none.
        has_names: whether the columns have names. Without names they are the inputs in their order.
        rows: how many rows there are.
    """

    def __init__(self, names: Sequence[str] | None, columns: Sequence[Column], rows: int) -> None:
        """Raises InvalidInput if two columns have the same name."""
        self.has_names = names is not None
        found = [f"column {number}" for number in range(1, len(columns) + 1)] if names is None else names
        self.columns = dict(zip(found, columns, strict=True))
        if len(self.columns) < len(columns):
            twice = next(name for i, name in enumerate(found) if name in found[:i])
            raise InvalidInput(f"the table has two columns {name_text(twice)}; rename one")
        self.rows = rows

    @property
    def names(self) -> Sequence[str]:
        """The names of the columns, empty if they have none."""
        return tuple(self.columns) if self.has_names else ()


def takes_tables(signature: Signature) -> bool:
    """Whether the inputs of a model have one value, or a list of values, a row."""
    return all(spec.shape is None or 1 <= len(spec.shape) <= 2 for spec in signature.inputs)


def table_tensors(signature: Signature, table: Table, allowance: Allowance) -> Tensors:
    """The inputs that a table holds.

    Raises InvalidInput for a column that is no input, a missing one, too many rows, or a wrong value, and
    what `Allowance.take` raises.
    """
    if table.rows > MOST_ROWS:
        raise InvalidInput(
            f"the table has {table.rows} rows; at most {MOST_ROWS} are allowed; send them in several requests"
        )
    by_name = signature.inputs_by_name
    allowance.take(2 * _CELL_BYTES * table.rows * len(table.columns), "the columns of the table")
    single = signature.single_input
    if single is not None and by_name.keys().isdisjoint(table.columns) and _takes_features(single):
        tensors = {single.name: _features(single, table)}
    else:
        columns = table.columns
        if not table.has_names:
            required = [spec.name for spec in signature.inputs if not spec.optional]
            if len(required) != len(columns):
                raise InvalidInput(
                    f"the table has {len(columns)} columns without names; the model takes"
                    f" {names_text(required)}",
                    expected=len(required),
                    got=len(columns),
                )
            columns = dict(zip(required, columns.values(), strict=True))
        tensors = {}
        for name, column in columns.items():
            spec = by_name.get(name)
            if spec is None:
                raise unknown_input(signature, name)
            tensors[name] = as_column(spec, column.tensor(spec))
    check_inputs(signature, tensors)
    return tensors


def read_json_table(field: str, value: Any, signature: Signature) -> Table:
    """The table in a field of a JSON body, which says how pandas has written it; raises InvalidInput."""
    if field in _RECORDS:
        if not isinstance(value, list):
            raise wrong_field(field, value, "a list with an object for each row")
        columns = transpose(value, field, signature.inputs_by_name)
        return Table(list(columns), [*map(ListColumn, columns.values())], len(value))
    if not isinstance(value, dict):
        raise wrong_field(field, value, "an object")
    if field in _SPLIT:
        return _read_split(field, value)
    rows = 0
    for number, (name, values) in enumerate(value.items()):
        if not isinstance(values, list):
            raise wrong_field(f"{field}.{name[:100]}", values, "a list with a value for each row")
        if number and len(values) != rows:
            raise InvalidInput(
                f'"{field}" has columns of {rows} and of {len(values)} rows', field=field, got=len(values)
            )
        rows = len(values)
    return Table(list(value), [*map(ListColumn, value.values())], rows)


def _read_split(field: str, value: dict[str, Any]) -> Table:
    """The table of `{"columns": names, "data": rows}`; the names of the rows, `index`, are of no use."""
    unknown = next((key for key in value if key not in _SPLIT_FIELDS), None)
    names, data = value.get("columns"), value.get("data")
    if unknown is not None:
        raise InvalidInput(
            f'"{field}" has an unknown field, {value_text(unknown)}; it takes {names_text(_SPLIT_FIELDS)}',
            field=field,
        )
    if not isinstance(data, list):
        raise wrong_field(f"{field}.data", data, "a list with a list for each row")
    if names is None and data and isinstance(data[0], list):
        width = len(data[0])
    elif isinstance(names, list) and all(isinstance(name, str) for name in names):
        width = len(names)
    else:
        raise wrong_field(f"{field}.columns", names, "a list of names")
    for index, row in enumerate(data):
        if not isinstance(row, list) or len(row) != width:
            got = f"a list of {len(row)}" if isinstance(row, list) else value_text(row)
            raise InvalidInput(
                f'"{field}.data" at [{index}] is {got}; there are {width} columns',
                field=f"{field}.data",
                index=[index],
                expected=width,
            )
    columns = [ListColumn([row[number] for row in data]) for number in range(width)]
    return Table(names, columns, len(data))


def _takes_features(spec: TensorSpec) -> bool:
    return spec.shape is None or len(spec.shape) in (1, 2)


def _features(spec: TensorSpec, table: Table) -> Array:
    """The columns in their order as the only input of a model, `[n, k]`, or `[n]` for one column."""
    is_flat = spec.shape is not None and len(spec.shape) == 1
    width = ANY if spec.shape is None else 1 if is_flat else spec.shape[1]
    if not table.columns and not table.rows and not is_flat:  # records without rows have no names either
        return np.empty((0, max(width, 0)), spec.dtype)
    if width not in (ANY, len(table.columns)):
        raise InvalidInput(
            f"the table has {len(table.columns)} columns, and none is called {name_text(spec.name)}, which is"
            f" the only input; it takes {width} values a row",
            tensor=spec.name,
            expected=width,
            got=len(table.columns),
        )
    parts = [column.tensor(TensorSpec(name, spec.datatype, (ANY,))) for name, column in table.columns.items()]
    for name, part in zip(table.columns, parts, strict=True):
        if part.ndim != 1:
            raise InvalidInput(f"column {name_text(name)} has lists; it takes one value a row")
    if is_flat:
        return parts[0]
    return np.stack(parts, axis=1) if parts else np.empty((table.rows, 0), spec.dtype)
