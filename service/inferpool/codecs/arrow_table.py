"""Arrow and Parquet files as tables, by pyarrow, which is an extra: `pip install inferpool[tables]`.

What a file becomes in memory is known before pyarrow reads it: an Arrow message says how long its buffers
are, also if they are compressed, and a Parquet file how many rows it has and how long its pages are.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

from inferpool.allowance import Allowance
from inferpool.codecs.table import Column, Table
from inferpool.errors import InvalidInput, MalformedBody, UnsupportedMediaType
from inferpool.system.install_hints import install_command
from inferpool.tensors import FLOATS, MOST_ROWS, Array, TensorSpec, name_text
from inferpool.wire.columns import column_tensor
from inferpool.wire.npy import cast_to

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:  # the extra is not installed
    pa = pq = None

_FILE_MAGIC: Final = b"ARROW1\x00\x00"
_CONTINUATION: Final = 0xFFFFFFFF
_RECORD_BATCH: Final = 3
_DICTIONARY_BATCH: Final = 2
_VALUE_BYTES: Final = 24
"""Bytes of a value in a column, in the datatype of the file and in that of the model."""
_TEXT_BYTES: Final = 64
"""Bytes of a short Python string and the reference to it, without its characters."""
_THRIFT_BYTES: Final = 16 * 2**20


class ArrowColumn(Column):
    """A column of an Arrow table."""

    def __init__(self, name: str, values: Any) -> None:
        """Keep `values`, a chunked array of pyarrow."""
        self._name = name
        self._values = values

    def tensor(self, spec: TensorSpec) -> Array:
        """The values in the datatype of `spec`; raises InvalidInput with the row at fault."""
        values = self._values
        kind = values.type
        if values.null_count and spec.datatype not in FLOATS:
            row = next(row for row, value in enumerate(values) if not value.is_valid)
            raise InvalidInput(
                f"column {name_text(self._name)} has no value in row {row + 1}; an input of {spec.datatype}"
                " has no missing values",
                tensor=spec.name,
                index=[row],
            )
        if pa.types.is_dictionary(kind):
            return self._from_dictionary(spec)
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            array: Array = values.to_numpy()
            if array.dtype == np.object_:  # booleans without some values
                return column_tensor(spec, values.to_pylist())
            return cast_to(TensorSpec(spec.name, spec.datatype, None), array)
        return column_tensor(spec, values.to_pylist())

    def _from_dictionary(self, spec: TensorSpec) -> Array:
        """The values of a column that has each value once, and the positions of the values."""
        parts = []
        for chunk in self._values.chunks:
            once = ArrowColumn(self._name, pa.chunked_array([chunk.dictionary])).tensor(spec)
            positions = chunk.indices
            if positions.null_count:
                fill = np.full(1, np.nan).astype(once.dtype)
                once = np.concatenate([once, fill])
                positions = positions.fill_null(len(once) - 1)
            parts.append(once[positions.to_numpy(zero_copy_only=False)])
        return np.concatenate(parts) if parts else np.empty(0, spec.dtype)


def read_arrow(data: bytes, allowance: Allowance) -> Table:
    """The table in an Arrow stream or file.

    Raises MalformedBody, InvalidInput, UnsupportedMediaType if pyarrow is not installed, and what
    `Allowance.take` raises.
    """
    _require()
    # A file is a stream between two magic words.
    stream = memoryview(data)[len(_FILE_MAGIC) :] if data.startswith(_FILE_MAGIC) else memoryview(data)
    try:
        size = _arrow_bytes(stream)
    except (struct.error, ValueError, IndexError):
        raise MalformedBody("the body is not an Arrow stream or file, or it is cut off") from None
    allowance.take(size, "the columns of the body")
    try:
        with pa.ipc.open_stream(pa.py_buffer(stream)) as reader:
            table = reader.read_all()
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _malformed("an Arrow stream or file", error) from None
    return _table(table, allowance)


def read_parquet(data: bytes, allowance: Allowance) -> Table:
    """The table in a Parquet file. Raises as `read_arrow` does."""
    _require()
    try:
        limits = {"thrift_string_size_limit": _THRIFT_BYTES, "thrift_container_size_limit": _THRIFT_BYTES}
        found = pq.ParquetFile(pa.BufferReader(data), **limits)
        facts = found.metadata
        sizes = sum(
            max(0, facts.row_group(group).column(column).total_uncompressed_size)
            for group in range(facts.num_row_groups)
            for column in range(facts.num_columns)
        )
        rows = facts.num_rows
        texts = [field.name for field in found.schema_arrow if _is_text(field.type)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _malformed("a Parquet file", error) from None
    _check_rows(rows)
    # A page may repeat a value without its bytes: what counts is how many values there are.
    allowance.take(2 * sizes + _VALUE_BYTES * rows * facts.num_columns, "the columns of the body")
    try:
        # A text that is repeated is kept once.
        table = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts, **limits).read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _malformed("a Parquet file", error) from None
    return _table(table, allowance)


def _require() -> None:
    if pa is None:
        raise UnsupportedMediaType(
            f"this server cannot read Arrow and Parquet; install pyarrow: {install_command('tables')}",
            expected=["text/csv", "application/json"],
        )


def _malformed(what: str, error: Exception) -> MalformedBody:
    return MalformedBody(f"the body is not {what}: {str(error).splitlines()[0][:200] if str(error) else ''}")


def _table(table: Any, allowance: Allowance) -> Table:
    """A table of pyarrow as one of this package; the index that pandas adds is left out."""
    _check_rows(table.num_rows)
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    texts = sum(
        table.num_rows if not pa.types.is_dictionary(table.column(name).type) else 0
        for name in names
        if _is_text(table.column(name).type)
    )
    allowance.take(
        _TEXT_BYTES * texts + _VALUE_BYTES * table.num_rows * len(names), "the columns of the body"
    )
    return Table(names, [ArrowColumn(name, table.column(name)) for name in names], table.num_rows)


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _check_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise InvalidInput(
            f"the table has {rows} rows; at most {MOST_ROWS} are allowed; send them in several requests"
        )


def _arrow_bytes(stream: memoryview) -> int:
    """How many bytes the buffers of all messages of a stream take, once they are decompressed.

    Raises struct.error or ValueError if the stream is cut off, or no stream.
    """
    total = position = 0
    while position < len(stream):
        length, position = _unpack("<I", stream, position), position + 4
        if length == _CONTINUATION:
            length, position = _unpack("<I", stream, position), position + 4
        if not length:
            break  # the end of the stream
        message = stream[position : position + length]
        position += length
        root = _Flat(message, _unpack("<I", message, 0))
        body_bytes = root.number(3, "<q")
        if len(message) < length or not 0 <= body_bytes <= len(stream) - position:
            raise ValueError("the stream is cut off")
        header, kind = root.table(2), root.number(1, "<B")
        if kind == _DICTIONARY_BATCH and header is not None:
            header = header.table(1)
        if kind in (_RECORD_BATCH, _DICTIONARY_BATCH) and header is not None:
            total += body_bytes
            if header.table(3) is not None:
                total += _decompressed_bytes(header, stream[position : position + body_bytes])
        position += body_bytes
    return total


def _decompressed_bytes(batch: _Flat, body: memoryview) -> int:
    """How many bytes the compressed buffers of a record batch become: each begins with its length."""
    total = 0
    for offset, length in batch.pairs(2):
        if length >= 8:
            total += max(0, int(_unpack("<q", body, offset)), length)
    return total


class _Flat:
    """A table of a FlatBuffer: its vector of offsets tells where each field is."""

    def __init__(self, data: memoryview, position: int) -> None:
        """Look at the table at `position` of `data`."""
        self._data = data
        self._position = position
        self._offsets = position - int(_unpack("<i", data, position))
        self._length = int(_unpack("<H", data, self._offsets))

    def _field(self, number: int) -> int:
        """The position of a field, 0 if the table lacks it."""
        at = 4 + 2 * number
        offset = int(_unpack("<H", self._data, self._offsets + at)) if at < self._length else 0
        return self._position + offset if offset else 0

    def number(self, number: int, form: str) -> int:
        """A number; 0 if the table lacks it."""
        position = self._field(number)
        return int(_unpack(form, self._data, position)) if position else 0

    def table(self, number: int) -> _Flat | None:
        """A table within this one; None if it is not there."""
        position = self._field(number)
        return _Flat(self._data, position + int(_unpack("<I", self._data, position))) if position else None

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """A vector of two numbers of 64 bits each; empty if it is not there."""
        position = self._field(number)
        if not position:
            return []
        position += int(_unpack("<I", self._data, position))
        count = int(_unpack("<I", self._data, position))
        if 16 * count > len(self._data):
            raise ValueError("a vector is longer than its message")
        return [struct.unpack_from("<qq", self._data, position + 4 + 16 * i) for i in range(count)]


def _unpack(form: str, data: memoryview, position: int) -> Any:
    if position < 0:
        raise ValueError("an offset is negative")
    return struct.unpack_from(form, data, position)[0]
