"""Reads the rows of a file in chunks: CSV, Parquet, JSON lines, npy, npz, text, a folder of pictures."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from inferpool.client.content import Arrays, Content, File, Frame, Pictures, Sentences
from inferpool.errors import InvalidInput
from inferpool.system.install_hints import install_command

PICTURE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ARRAY_BYTES: Final = 2**20
_TABLE_ROWS: Final = 1024
_SENTENCES: Final = 64
_PICTURES: Final = 8


class Chunk(NamedTuple):
    """Some rows of a file.

    Attributes:
        start: the number of the first row, from 0.
        rows: how many rows there are.
        content: returns what is sent for the rows from one index of the chunk up to another.
        names: the names of the rows, for pictures; else empty.
    """

    start: int
    rows: int
    content: Callable[[int, int], Content]
    names: Sequence[str] = ()


class Source(NamedTuple):
    """The rows of a file.

    Attributes:
        chunks: the chunks, in order; the same ones at each call.
        rows: how many rows there are; None if that is not known before the end.
        fingerprint: changes if the file does.
    """

    chunks: Callable[[], Iterator[Chunk]]
    rows: int | None
    fingerprint: str


def open_source(path: Path, rows_per_request: int | None) -> Source:
    """Open `path`, whose suffix says what it is; a folder has pictures.

    Raises OSError if it cannot be read, InvalidInput if it is of no known kind or damaged.
    """
    if path.is_dir():
        return _pictures(path, rows_per_request or _PICTURES)
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            return _picture_files([path], rows_per_request or _PICTURES)
        known = ", ".join(_OPENERS)
        raise InvalidInput(f"{path.name}: expected {known}, a picture, or a folder of pictures")
    stat = path.stat()
    fingerprint = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    rows, chunks = opener(path, rows_per_request)
    return Source(lambda: _readable(path, chunks()), rows, fingerprint)


def _readable(path: Path, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks of a file, whose text and form may be found to be wrong anywhere in it."""
    try:
        yield from chunks
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InvalidInput(f"{path.name} is not UTF-8: it has the byte 0x{byte:02x}; convert it") from None
    except csv.Error as error:
        raise InvalidInput(f"{path.name} is not CSV: {error}") from None


_Opened = tuple[int | None, Callable[[], Iterator[Chunk]]]


def _open_csv(path: Path, step: int | None) -> _Opened:
    def chunks() -> Iterator[Chunk]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            first = next(reader, None)
            if first is None:
                return
            header = None if all(map(_is_number, first)) else first
            rows = iter([first]) if header is None else iter(())
            yield from _chunks(
                _chain(rows, reader), step or _TABLE_ROWS, lambda kept: _csv_body(header, kept)
            )

    return None, chunks


def _chain(*parts: Iterator[list[str]]) -> Iterator[list[str]]:
    for part in parts:
        for row in part:
            if row:  # the module gives an empty row for an empty line
                yield row


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _csv_body(header: list[str] | None, rows: list[list[str]]) -> Content:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header is not None:
        writer.writerow(header)
    writer.writerows(rows)
    kind = "absent" if header is None else "present"
    return File(f"text/csv; header={kind}", text.getvalue().encode())


def _open_json_lines(path: Path, step: int | None) -> _Opened:
    def values() -> Iterator[Any]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield orjson.loads(line)
                    except orjson.JSONDecodeError as error:
                        raise InvalidInput(f"{path.name}, line {number} is not JSON: {error}") from None

    def body(rows: list[Any]) -> Content:
        field = "records" if isinstance(rows[0], dict) else "inputs"
        return File("application/json", orjson.dumps({field: rows}))

    return None, lambda: _chunks(values(), step or _TABLE_ROWS, body)


def _open_text(path: Path, step: int | None) -> _Opened:
    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\r\n")

    return None, lambda: _chunks(lines(), step or _SENTENCES, lambda rows: Sentences(rows))


def _chunks(rows: Iterator[Any], step: int, body: Callable[[list[Any]], Content]) -> Iterator[Chunk]:
    start = 0
    while kept := list(islice(rows, step)):
        yield Chunk(start, len(kept), partial(_some, body, kept))
        start += len(kept)


def _some(body: Callable[[Any], Content], rows: Any, first: int, end: int) -> Content:
    return body(rows[first:end])


def _open_parquet(path: Path, step: int | None) -> _Opened:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise InvalidInput(f"Parquet needs pyarrow: {install_command('tables')}") from None
    try:
        file = parquet.ParquetFile(path)
    except pa.ArrowException as error:
        raise InvalidInput(f"{path.name} is no Parquet file: {error}") from None

    def chunks() -> Iterator[Chunk]:
        start = 0
        for batch in file.iter_batches(batch_size=step or _TABLE_ROWS):
            table = pa.Table.from_batches([batch])
            yield Chunk(start, len(table), partial(_some, Frame, table))
            start += len(table)

    return file.metadata.num_rows, chunks


def _open_npy(path: Path, step: int | None) -> _Opened:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = (
            {None: loaded}
            if isinstance(loaded, np.ndarray)
            else {name: loaded[name] for name in loaded.files}
        )
    except (ValueError, EOFError, OSError) as error:
        raise InvalidInput(f"{path.name} has no arrays of numbers or strings: {error}") from None
    counts = {len(array) if array.ndim else -1 for array in arrays.values()}
    if len(counts) != 1 or -1 in counts:
        raise InvalidInput(f"{path.name} needs arrays with the same number of rows")
    rows = counts.pop()
    size = sum(array.nbytes for array in arrays.values())
    width = step or max(1, min(_TABLE_ROWS, _ARRAY_BYTES * rows // max(1, size)))

    def chunks() -> Iterator[Chunk]:
        for start in range(0, rows, width):
            end = min(rows, start + width)

            def content(first: int, last: int, start: int = start) -> Content:
                return Arrays(
                    {name: _plain(array[start + first : start + last]) for name, array in arrays.items()}
                )

            yield Chunk(start, end - start, content)

    return rows, chunks


def _plain(array: Any) -> Any:
    return array.astype(np.str_).astype(object) if array.dtype.kind in "US" else np.ascontiguousarray(array)


def _pictures(folder: Path, step: int) -> Source:
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    )
    if not files:
        raise InvalidInput(f"{folder} has no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return _picture_files(files, step)


def _picture_files(files: Sequence[Path], step: int) -> Source:
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns]).encode())

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(files), step):
            kept = files[start : start + step]
            names = [path.name for path in kept]
            yield Chunk(start, len(kept), partial(_some, Pictures, kept), names)

    return Source(chunks, len(files), digest.hexdigest())


_OPENERS: Final[dict[str, Callable[[Path, int | None], _Opened]]] = {
    ".csv": _open_csv,
    ".parquet": _open_parquet,
    ".jsonl": _open_json_lines,
    ".ndjson": _open_json_lines,
    ".npy": _open_npy,
    ".npz": _open_npy,
    ".txt": _open_text,
}
