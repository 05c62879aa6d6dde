"""CSV (RFC 4180): a table in, and the outputs as a table out.

The first line has the names of the columns if the media type says so (`header=present`). If it says
nothing, it has them if one of them is the name of an input, or if the model takes numbers and the line has
a cell that is none. The latter is a guess, and needs rows below the line: a line alone may be a wrong row.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np

from inferpool.allowance import Allowance
from inferpool.codecs.table import Column, Table
from inferpool.errors import InvalidInput, MalformedBody, UnsupportedMediaType
from inferpool.tensors import (
    Array,
    Signature,
    TensorSpec,
    bf16_to_fp32,
    name_text,
    names_text,
    shape_text,
    value_text,
)
from inferpool.wire.columns import column_tensor
from inferpool.wire.large_bytes import count, free, not_utf8_at

_HEADER: Final = re.compile(r"(?:^|[\s;])header\s*=\s*\"?(present|absent)\b", re.IGNORECASE)
_CELL_BYTES: Final = 120
"""Bytes of a cell as a string and as a number, with references to both."""
_PIECE_ROWS: Final = 512
_BOOLEANS: Final = {"true": True, "false": False, "1": True, "0": False}


class TextColumn(Column):
    """The cells of a column of CSV; an empty cell is a missing value, or an empty string."""

    def __init__(self, name: str, cells: list[str]) -> None:
        """Keep the `cells`, one a row."""
        self._name = name
        self._cells = cells

    def tensor(self, spec: TensorSpec) -> Array:
        """The cells in the datatype of `spec`; raises InvalidInput with the row at fault."""
        if spec.datatype == "BYTES":
            return column_tensor(spec, self._cells)
        read = _boolean if spec.datatype == "BOOL" else _number
        values: list[Any] = []
        for cell in self._cells:
            value = read(cell)
            if value is _WRONG:
                expected = "true or false" if spec.datatype == "BOOL" else "a number"
                raise InvalidInput(
                    f"column {name_text(self._name)} has {value_text(cell)} in row {len(values) + 1}; it"
                    f" takes {expected}",
                    tensor=spec.name,
                    index=[len(values)],
                    value=value_text(cell),
                )
            values.append(value)
        return column_tensor(spec, values)


_WRONG: Final = object()
"""Stands for a cell that is no value of the datatype."""


def _number(cell: str) -> Any:
    text = cell.strip()
    if not text:
        return None
    if "_" in text:  # Python takes 1_000 for a number
        return _WRONG
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return _WRONG


def _boolean(cell: str) -> Any:
    text = cell.strip().lower()
    return _BOOLEANS.get(text, _WRONG) if text else None


def read_csv(data: bytes, parameters: str, signature: Signature, allowance: Allowance) -> Table:
    """The table in a CSV body; `parameters` are those of its media type.

    Raises MalformedBody, InvalidInput for lines of different lengths, UnsupportedMediaType for another
    charset than UTF-8, and what `Allowance.take` raises.
    """
    lines = count(data, b"\n") + 1
    cells = count(data, b",") + lines
    allowance.take(6 * len(data) + _CELL_BYTES * cells, "reading the CSV of the body")
    position = not_utf8_at(data)
    if position >= 0:
        raise MalformedBody(
            f"the body is not UTF-8: byte 0x{data[position]:02x} at offset {position}", position=position
        )
    try:
        # Decoded as it is read: the text of all lines at once would hold the GIL.
        lines_read = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")
        rows = [row for row in csv.reader(lines_read, strict=True) if row]
    except csv.Error as error:
        raise MalformedBody(f"the body is not CSV: {error}") from None
    if not rows:
        raise InvalidInput("the table is empty: it has neither names nor rows")
    said = _HEADER.search(parameters)
    has_names = said[1].lower() == "present" if said is not None else _is_header(rows[0], signature)
    names = rows.pop(0) if has_names else None
    if names and not rows and said is None and signature.inputs_by_name.keys().isdisjoint(names):
        raise InvalidInput(
            f"the only line of the table has cells that are no numbers and name no input: {names_text(names)}"
            f"; the model takes {names_text(signature.inputs_by_name)}; send rows below the line, or the"
            " parameter header=present for a table without rows",
            field="columns",
        )
    width = len(names if names is not None else rows[0])
    for index, row in enumerate(rows):
        if len(row) != width:
            raise InvalidInput(
                f"row {index + 1} of the table has {len(row)} cells; there are {width} columns",
                index=[index],
                expected=width,
                got=len(row),
            )
    shown = names if names is not None else [f"column {number}" for number in range(1, width + 1)]
    columns = [TextColumn(shown[number], [row[number] for row in rows]) for number in range(width)]
    height = len(rows)
    free(rows)
    return Table(names, columns, height)


def _is_header(cells: list[str], signature: Signature) -> bool:
    if not signature.inputs_by_name.keys().isdisjoint(cells):
        return True
    if any(spec.datatype in ("BYTES", "BOOL") for spec in signature.inputs):
        return False
    return any(_number(cell) is _WRONG for cell in cells)


def write_csv(outputs: Mapping[str, Any], bf16: Collection[str], *, header: bool) -> Iterator[bytes]:
    """Yield the outputs as CSV, some rows at a time, with a line of names if `header` is set.

    An output `[n, k]` has k columns. The outputs named in `bf16` hold raw bits. A NaN is an empty cell.
    Raises UnsupportedMediaType if an output has no such shape.
    """
    names: list[str] = []
    parts: list[Array] = []
    for name, value in outputs.items():
        if not isinstance(value, np.ndarray) or value.ndim not in (1, 2):
            shape = shape_text(value.shape) if isinstance(value, np.ndarray) else "no shape"
            raise UnsupportedMediaType(
                f"the output {name_text(name)} has {shape}, and CSV holds values and lists of values a row;"
                " accept application/json",
                expected=["application/json"],
            )
        plain = bf16_to_fp32(value) if name in bf16 else value
        table = plain if plain.ndim == 2 else plain[:, np.newaxis]
        parts.append(table)
        width = table.shape[1]
        names += [name] if width == 1 else [f"{name}_{number}" for number in range(width)]
    if len({len(part) for part in parts}) > 1:
        raise UnsupportedMediaType(
            "the outputs differ in their rows, which CSV cannot hold; accept application/json",
            expected=["application/json"],
        )
    if header:
        yield _lines([names])
    for start in range(0, len(parts[0]) if parts else 0, _PIECE_ROWS):
        columns = [part[start : start + _PIECE_ROWS].tolist() for part in parts]
        yield _lines(
            [[_cell(value) for cells in row for value in cells] for row in zip(*columns, strict=True)]
        )


def _cell(value: Any) -> Any:
    return "" if value != value else str(value).lower() if isinstance(value, bool) else value


def _lines(rows: list[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
