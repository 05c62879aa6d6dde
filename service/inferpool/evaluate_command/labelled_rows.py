"""Reads rows whose answers are known: a table, arrays, or folders of pictures by class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.predict_command.rows_in import PICTURE_SUFFIXES
from inferpool.system.install_hints import install_command

DEFAULT_TARGET: Final = "target"


class LabelledRows(NamedTuple):
    """Rows, and the answers that are right.

    Attributes:
        inputs: what a client of the server predicts with.
        targets: the right answer of each row: a class or a number.
        slices: for each column that rows are grouped by, its value in each row.
        digest: SHA-256 of the data, as hex.
    """

    inputs: Any
    targets: Sequence[Any]
    slices: Mapping[str, Sequence[str]]
    digest: str


def read_labelled(
    path: Path, target: str | None, slices: Sequence[str] = (), ignored: Sequence[str] = ()
) -> LabelledRows:
    """Read CSV, Parquet, JSON lines, npz, or a folder that has a folder of pictures for each class.

    `target` is the column, or array, of the right answers; `slices` are columns whose values group the rows,
    `ignored` those that the model is not given. A single column of strings holds sentences. Raises
    InvalidInput if something is missing or unreadable, and OSError.
    """
    if path.is_dir():
        return _pictures(path)
    column = target or DEFAULT_TARGET
    if path.suffix.lower() == ".npz":
        return _arrays(path, column)
    return _table(path, column, slices, ignored)


def _pictures(folder: Path) -> LabelledRows:
    files: list[Path] = []
    targets: list[str] = []
    for inner in sorted(each for each in folder.iterdir() if each.is_dir()):
        own = sorted(file for file in inner.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
        files += own
        targets += [inner.name] * len(own)
    if not files:
        raise InvalidInput(f"{folder} needs a folder of pictures for each class")
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return LabelledRows(files, targets, {}, digest.hexdigest())


def _arrays(path: Path, target: str) -> LabelledRows:
    try:
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError) as error:
        raise InvalidInput(f"{path.name} has no arrays of numbers or strings: {error}") from None
    if target not in arrays:
        raise InvalidInput(f'{path.name} has no array "{target}"; it has {", ".join(arrays)}')
    targets = arrays.pop(target)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1 or not arrays or {len(each) for each in arrays.values()} != {len(targets)}:
        raise InvalidInput(f'{path.name} needs inputs with as many rows as "{target}", which is [rows]')
    inputs = next(iter(arrays.values())) if len(arrays) == 1 else arrays
    return LabelledRows(inputs, targets.tolist(), {}, file_digest(path))


def _table(path: Path, target: str, slices: Sequence[str], ignored: Sequence[str]) -> LabelledRows:
    table = read_table(path)
    for name in (target, *slices, *ignored):
        if name not in table.column_names:
            raise InvalidInput(f'{path.name} has no column "{name}"; it has {", ".join(table.column_names)}')
    targets = table.column(target).to_pylist()
    if not targets:
        raise InvalidInput(f"{path.name} has no rows")
    if None in targets:
        raise InvalidInput(f'row {targets.index(None)} has no value in "{target}"')
    groups = {name: [str(value) for value in table.column(name).to_pylist()] for name in slices}
    table = table.drop_columns([target, *ignored])
    if not table.column_names:
        raise InvalidInput(f'{path.name} has no columns beside "{target}"')
    is_text = len(table.column_names) == 1 and str(table.schema.types[0]) in ("string", "large_string")
    inputs = table.column(0).to_pylist() if is_text else table
    return LabelledRows(inputs, targets, groups, file_digest(path))


def read_table(path: Path) -> Any:
    """The table in CSV, Parquet or JSON lines; raises InvalidInput, or OSError."""
    try:
        import pyarrow as pa
        from pyarrow import csv, json, parquet
    except ImportError:
        raise InvalidInput(f"tables need pyarrow: {install_command('evaluate')}") from None
    path.stat()  # pyarrow would put its own words around the error
    try:
        match path.suffix.lower():
            case ".csv":
                return csv.read_csv(path)
            case ".parquet":
                return parquet.read_table(path)
            case ".jsonl" | ".ndjson":
                return json.read_json(path)
    except pa.ArrowException as error:
        raise InvalidInput(f"{path.name} cannot be read: {error}") from None
    raise InvalidInput(f"{path.name}: expected .csv, .parquet, .jsonl, .ndjson, .npz or a folder of folders")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
