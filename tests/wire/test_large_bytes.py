"""Large bodies are copied in pieces, so that no copy holds the GIL for long."""

from __future__ import annotations

import zipfile
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.allowance import Allowance
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody
from inferpool.http.predict.compression import gzipped
from inferpool.wire import large_bytes, npy
from inferpool.wire.large_bytes import PIECE_BYTES, as_bytes, count, free, lines_as_list, not_utf8_at, pieces
from inferpool.wire.npy import decode_npy, decode_npz, encode_npy, encode_npz

LIMIT = Allowance(2**26)
LARGE = np.arange(3 * PIECE_BYTES + 5, dtype=np.uint32).astype(np.uint8)


class Sizes:
    """Notes how many bytes each write, read or compression takes."""

    def __init__(self) -> None:
        self.all: list[int] = []

    def note(self, size: int) -> None:
        self.all.append(size)

    def assert_small(self) -> None:
        assert sum(self.all) >= 3 * PIECE_BYTES, "nothing was noted"
        assert max(self.all) <= PIECE_BYTES


@pytest.fixture
def sizes() -> Sizes:
    return Sizes()


def noting_writes(sizes: Sizes) -> type[BytesIO]:
    class Noting(BytesIO):
        def write(self, data: Any) -> int:
            sizes.note(len(data))
            return super().write(data)

    return Noting


def test_a_large_copy_is_made_in_pieces(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_bytes, "BytesIO", noting_writes(sizes))
    for data in (LARGE.data, bytearray(LARGE), LARGE.view(np.uint8)[::1].data):
        assert as_bytes(data) == LARGE.tobytes()
    sizes.assert_small()


def test_bytes_are_not_copied() -> None:
    content = LARGE.tobytes()
    assert as_bytes(content) is content


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES])
def test_pieces_are_all_of_it(size: int) -> None:
    data = LARGE[:size].tobytes()
    assert b"".join(pieces(data)) == data == as_bytes(memoryview(data))
    assert count(data, b"\x07") == data.count(b"\x07")


def test_an_npz_file_is_read_in_pieces(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    read = zipfile.ZipExtFile.read

    def noting(file: zipfile.ZipExtFile, size: int | None = -1) -> bytes:
        found = read(file, size)
        sizes.note(len(found))
        return found

    for write in (np.savez, np.savez_compressed):
        body = BytesIO()
        write(body, x=LARGE)
        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipExtFile, "read", noting)
            np.testing.assert_array_equal(decode_npz(body.getvalue(), LIMIT)["x"], LARGE)
    sizes.assert_small()


def test_a_member_that_says_more_than_it_has_is_refused() -> None:
    body = bytearray(encode_npz({"x": LARGE[:1000]}))
    directory = body.rindex(b"PK\x01\x02")
    body[directory + 24 : directory + 28] = (10**6).to_bytes(4, "little")
    with pytest.raises(MalformedBody):
        decode_npz(bytes(body), LIMIT)


def test_an_npz_file_is_written_in_pieces(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy, "BytesIO", noting_writes(sizes))
    written = encode_npz({"x": LARGE, "y": np.zeros((0, 3), np.float32), "z": np.array(["a", "é"], object)})
    sizes.assert_small()
    found = np.load(BytesIO(written))
    np.testing.assert_array_equal(found["x"], LARGE)
    assert (found["y"].shape, found["z"].tolist()) == ((0, 3), ["a", "é"])


def test_a_large_answer_is_compressed_in_pieces(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    make = zlib.compressobj

    class Noting:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._stream = make(*arguments, **options)

        def compress(self, data: Any) -> bytes:
            sizes.note(len(data))
            return self._stream.compress(data)

        def flush(self) -> bytes:
            return self._stream.flush()

    monkeypatch.setattr(zlib, "compressobj", Noting)
    packed = gzipped([b"head", LARGE.data])
    assert packed is not None
    assert zlib.decompress(packed, 16 + zlib.MAX_WBITS) == b"head" + LARGE.tobytes()
    sizes.assert_small()


def test_the_strings_of_an_npy_file_are_bounded() -> None:
    for texts in (np.full(20_000, "é"), np.full(20_000, b"e")):
        found = decode_npy(encode_npy(texts) if texts.dtype.kind == "U" else _saved(texts), LIMIT)
        assert found.shape == (20_000,)
        assert set(found.tolist()) <= {"é", "e"}
    with pytest.raises(BodyTooLarge, match="the array has 300000 strings"):
        decode_npy(encode_npy(np.full(300_000, "a")), LIMIT)


def _saved(array: Any) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


@given(st.lists(st.sampled_from([b"", b" ", b"\r", b"[1, 2]", b' {"a": 1} ', b"3\r", b"\t"])))
def test_lines_become_a_list_without_the_blank_ones(lines: list[bytes]) -> None:
    expected = [orjson.loads(line) for line in lines if line.strip()]
    assert orjson.loads(lines_as_list(b"\n".join(lines), b"instances")) == {"instances": expected}


def test_lines_are_bounded_before_they_are_taken_apart() -> None:
    with pytest.raises(InvalidInput, match="the body has 3000000 lines"):
        lines_as_list(b"\n" * 3_000_000, b"instances")


@given(
    st.integers(1, 7),
    st.one_of(st.binary(max_size=30), st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace"))),
)
def test_the_first_byte_that_is_not_utf8_is_found_in_pieces(size: int, data: bytes) -> None:
    expected = -1
    try:
        data.decode()
    except UnicodeDecodeError as error:
        expected = error.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_bytes, "PIECE_BYTES", size)
        assert not_utf8_at(data) == expected


def test_a_list_is_freed_in_pieces() -> None:
    class Noting(list[int]):
        def __delitem__(self, index: Any) -> None:
            freed.append(len(self[index]))
            super().__delitem__(index)

    freed: list[int] = []
    items = Noting(range(100_000))
    free(items)
    assert (len(items), sum(freed)) == (0, 100_000)
    assert max(freed) <= 4096
