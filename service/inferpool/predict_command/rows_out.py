"""Writes the answers of a run as CSV, Parquet, JSON lines or npz; a file appears complete or not at all."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from inferpool.errors import InvalidInput
from inferpool.predict_command.finished_chunks import Finished
from inferpool.system.install_hints import install_command
from inferpool.tensors import Array

_Row = dict[str, Any]


def check_output(path: Path) -> None:
    """Raise InvalidInput unless the suffix of `path` is one that can be written."""
    if path.suffix.lower() not in _WRITERS:
        raise InvalidInput(f"{path.name}: the output is {', '.join(_WRITERS)}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise InvalidInput(f"Parquet needs pyarrow: {install_command('tables')}") from None


def write_output(path: Path, read: Callable[[], Iterator[Finished]], *, with_errors: bool) -> None:
    """Write the chunks that `read` returns to `path`, with a column of errors if `with_errors`.

    Raises OSError, and InvalidInput if the format cannot hold the outputs.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    # A chunk whose rows all have errors does not know the outputs.
    empty: dict[str, Array] = {}
    for chunk in read():
        if chunk.outputs:
            empty = {name: values[:0] for name, values in chunk.outputs.items()}
            break
    whole = (chunk if chunk.outputs else chunk._replace(outputs=empty) for chunk in read())
    _WRITERS[path.suffix.lower()](unfinished, whole, with_errors)
    unfinished.replace(path)


def _columns(chunk: Finished, with_errors: bool) -> dict[str, list[Any]]:
    """The columns of a chunk, with None where a row has an error; rows of an output are lists or values."""
    good = [index for index, error in enumerate(chunk.errors) if not error]
    columns: dict[str, list[Any]] = {}
    if chunk.names:
        columns["file"] = [*chunk.names]
    for name, values in chunk.outputs.items():
        column: list[Any] = [None] * len(chunk.errors)
        for index, value in zip(good, _flat(values).tolist(), strict=True):
            column[index] = value
        columns[name] = column
    if chunk.labels:
        columns["label"] = [label or None for label, _ in chunk.labels]
        columns["score"] = [score if label else None for label, score in chunk.labels]
    if with_errors:
        columns["error"] = [error or None for error in chunk.errors]
    return columns


def _flat(values: Array) -> Array:
    """Return rows of one value each as a vector."""
    return values.reshape(len(values)) if values.ndim > 1 and values.size == len(values) else values


def _write_csv(path: Path, chunks: Iterable[Finished], with_errors: bool) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: Any = None
        names: set[str] = set()
        for chunk in chunks:
            for row in _rows(_columns(chunk, with_errors)):
                flat = {name: value for key, inner in row.items() for name, value in _spread(key, inner)}
                if writer is None:
                    writer = csv.DictWriter(file, _csv_names(chunk, row), lineterminator="\n")
                    names = set(writer.fieldnames)
                    writer.writeheader()
                # A row with an error has the names of outputs, not of their elements.
                if any(flat[name] is not None for name in flat.keys() - names):
                    raise _differing_rows("CSV")
                writer.writerow({name: flat.get(name) for name in writer.fieldnames})


def _csv_names(chunk: Finished, row: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name in row:
        values = chunk.outputs.get(name)
        if values is None or _flat(values).ndim == 1:
            names.append(name)
        else:
            names += (f"{name}_{index}" for index in range(int(np.prod(values.shape[1:]))))
    return names


def _spread(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for index, inner in enumerate(np.asarray(value, object).reshape(-1).tolist()):
            yield f"{name}_{index}", inner
    else:
        yield name, value


def _rows(columns: Mapping[str, list[Any]]) -> Iterator[_Row]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _write_json_lines(path: Path, chunks: Iterable[Finished], with_errors: bool) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            for row in _rows(_columns(chunk, with_errors)):
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def _write_parquet(path: Path, chunks: Iterable[Finished], with_errors: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    writer: Any = None
    try:
        for chunk in chunks:
            columns = _columns(chunk, with_errors)
            types = {name: _arrow_type(pa, chunk, name, values) for name, values in columns.items()}
            arrays = [pa.array(values, types[name]) for name, values in columns.items()]
            table = pa.Table.from_arrays(arrays, names=list(columns))
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema)
            writer.write_table(table.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _arrow_type(pa: Any, chunk: Finished, name: str, values: list[Any]) -> Any:
    if name not in chunk.outputs:
        return pa.float64() if name == "score" else pa.string()
    array = _flat(chunk.outputs[name])
    kind = pa.string() if array.dtype.kind == "U" else pa.from_numpy_dtype(array.dtype)
    for _ in range(array.ndim - 1):
        kind = pa.list_(kind)
    return kind


def _write_npz(path: Path, chunks: Iterable[Finished], with_errors: bool) -> None:
    found = list(chunks)
    arrays: dict[str, Array] = {}
    try:
        for name in found[0].outputs if found else ():
            arrays[name] = np.concatenate([_filled(chunk.outputs[name], chunk.errors) for chunk in found])
    except ValueError:
        raise _differing_rows("npz") from None
    if found and found[0].names:
        arrays["file"] = np.array([name for chunk in found for name in chunk.names], np.str_)
    if found and found[0].labels:
        arrays["label"] = np.array([label for chunk in found for label, _ in chunk.labels], np.str_)
        arrays["score"] = np.array([score for chunk in found for _, score in chunk.labels])
    if with_errors:
        arrays["error"] = np.array([error for chunk in found for error in chunk.errors], np.str_)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _differing_rows(kind: str) -> InvalidInput:
    return InvalidInput(f"{kind} cannot hold an output whose rows differ in their shapes; write JSON lines")


def _filled(values: Array, errors: Iterable[str]) -> Array:
    """Return `values` with a row of NaN, or of zeros or empty texts, for each row with an error."""
    good = np.array([not error for error in errors], bool)
    filled = np.zeros((len(good), *values.shape[1:]), values.dtype)
    if values.dtype.kind == "f":
        filled[~good] = np.nan
    filled[good] = values
    return filled


_WRITERS: Final[Mapping[str, Callable[[Path, Iterable[Finished], bool], None]]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".jsonl": _write_json_lines,
    ".ndjson": _write_json_lines,
    ".npz": _write_npz,
}
