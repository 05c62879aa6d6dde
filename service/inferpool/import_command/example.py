"""The rows of `--example`: CSV, npy or npz, or texts, one a line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.tensors import Array


def read_example(path: Path) -> dict[str, Array]:
    """Return the columns, or arrays, of an example by name.

    An empty cell is NaN in a column of numbers, and an empty string in a column of strings.
    Raises InvalidInput and OSError.
    """
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        try:
            loaded = np.load(path, allow_pickle=False)
            found = {"x": loaded} if suffix == ".npy" else {name: loaded[name] for name in loaded.files}
        except (ValueError, EOFError) as error:
            raise InvalidInput(f"{path.name} has no arrays of numbers or strings: {error}") from None
    elif suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            head, *rows = [row for row in csv.reader(file) if row] or [[]]
        for number, row in enumerate(rows, 2):
            if len(row) != len(head):
                raise InvalidInput(f"{path.name}: row {number} has {len(row)} cells; expected {len(head)}")
        found = {name: read_column([row[at] for row in rows]) for at, name in enumerate(head)}
    elif suffix == ".txt":
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        found = {"text": np.array(lines, np.str_)}
    else:
        raise InvalidInput(f"{path.name}: expected .csv, .npy, .npz or .txt")
    if not found or not all(array.ndim and len(array) for array in found.values()):
        raise InvalidInput(f"{path.name} has no rows")
    counts = {name: len(array) for name, array in found.items()}
    if len(set(counts.values())) > 1:
        raise InvalidInput(f"{path.name}: arrays differ in their number of rows: {counts}")
    return found


def read_column(cells: Sequence[str]) -> Array:
    """Return the cells of a column as numbers if all that are not empty are numbers, else as strings."""
    try:
        return np.array([float(cell) if cell.strip() else np.nan for cell in cells])
    except ValueError:
        return np.array(cells, np.str_)
