"""Arrow and Parquet give the same inputs as other tables, and their memory is reserved before it is taken."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inferpool.allowance import UNLIMITED, Allowance
from inferpool.codecs import arrow_table
from inferpool.codecs.arrow_table import read_arrow, read_parquet
from inferpool.codecs.table import table_tensors
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody, UnsupportedMediaType

from tests.codecs.test_table import FEATURES, MIXED, NAMES, ROWS, check_rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Write = Callable[[Any], bytes]


def stream(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue()


def file(table: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet(table: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


READERS = {"stream": (stream, read_arrow), "file": (file, read_arrow), "parquet": (parquet, read_parquet)}


class Counted(Allowance):
    """Grants everything up to a limit, and adds it up."""

    def __init__(self, limit: int = 2**40) -> None:
        super().__init__(2**40)
        self.taken = 0
        self._limit = limit

    def take(self, size: int, what: str) -> None:
        self.taken += size
        if self.taken > self._limit:
            raise BodyTooLarge(what, limit=self._limit)


@pytest.mark.parametrize("form", READERS)
def test_every_format_gives_the_same_inputs(form: str) -> None:
    write, read = READERS[form]
    plain = pa.table({name: [row[name] for row in ROWS] for name in NAMES})
    repeated = plain.set_column(2, "city", plain["city"].dictionary_encode())
    for table in (plain, repeated):
        check_rows(table_tensors(MIXED, read(write(table), UNLIMITED), UNLIMITED))


@pytest.mark.parametrize("form", READERS)
def test_a_missing_integer_is_refused_with_its_row(form: str) -> None:
    write, read = READERS[form]
    table = pa.table({**{name: [row[name] for row in ROWS] for name in NAMES}, "count": [1, None]})
    with pytest.raises(InvalidInput, match='column "count" has no value in row 2'):
        table_tensors(MIXED, read(write(table), UNLIMITED), UNLIMITED)


def test_doubles_are_rounded_to_the_datatype_of_the_features() -> None:
    values = np.random.default_rng(1).normal(size=(500, 3))
    table = pa.table({name: values[:, number] for number, name in enumerate("abc")})
    found = table_tensors(FEATURES, read_parquet(parquet(table), UNLIMITED), UNLIMITED)["features"]
    np.testing.assert_array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_what_a_compressed_body_becomes_is_reserved_before_it_is_read(codec: str) -> None:
    """A small body of a million equal values asks for their memory, and is refused without it."""
    table = pa.table({name: np.zeros(200_000) for name in "abc"})
    small = stream(table, compression=codec)
    assert len(small) < 100_000
    counted = Counted()
    read_arrow(small, counted)
    assert counted.taken >= table.nbytes
    with pytest.raises(BodyTooLarge):
        read_arrow(small, Counted(table.nbytes // 2))


def test_what_a_parquet_file_becomes_is_reserved_before_it_is_read() -> None:
    table = pa.table({name: np.zeros(200_000) for name in "abc"})
    small = parquet(table)
    assert len(small) < 100_000
    counted = Counted()
    read_parquet(small, counted)
    assert counted.taken >= table.nbytes
    with pytest.raises(BodyTooLarge):
        read_parquet(small, Counted(table.nbytes // 2))


@pytest.mark.parametrize("form", READERS)
def test_damaged_bodies_are_refused(form: str) -> None:
    """Whatever byte is changed or missing, the body is read or refused, and nothing else happens."""
    write, read = READERS[form]
    body = write(pa.table({"a": [1.0, 2.0], "b": ["x", "y"]}))
    for position in range(0, len(body), 7):
        for damaged in (
            body[:position],
            body[:position] + bytes([body[position] ^ 0xFF]) + body[position + 1 :],
        ):
            with contextlib.suppress(MalformedBody, InvalidInput, BodyTooLarge):
                read(damaged, Counted(2**26))


@pytest.mark.parametrize("body", [b"this is not Arrow at all", b"ARROW1\0\0" + b"\xff" * 100])
def test_what_is_no_arrow_is_called_that(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="not an Arrow stream or file, or it is cut off"):
        read_arrow(body, UNLIMITED)


def test_without_pyarrow_the_answer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_table, "pa", None)
    with pytest.raises(UnsupportedMediaType, match=r"inferpool\[tables\]"):
        read_arrow(b"", UNLIMITED)
