"""numpy's files become tensors and back; damaged, too large and unsuitable files are refused."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inferpool.allowance import Allowance
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody, ModelFailed, UnsupportedMediaType
from inferpool.tensors import ANY, DTYPES, TensorSpec
from inferpool.wire import npy
from inferpool.wire.npy import cast_to, decode_npy, decode_npz, encode_npy, encode_npz

LIMIT = Allowance(1 << 20)


def saved(array: Any, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version=version)
    return file.getvalue()


def with_header(header: str, content: bytes = b"", version: int = 1) -> bytes:
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes((version, 0)) + size + header.encode() + content


NUMERIC = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)


@given(
    hnp.arrays(NUMERIC, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_every_numeric_array_is_read_and_written(
    array: np.ndarray[Any, Any], fortran: bool, version: tuple[int, int]
) -> None:
    laid_out = np.asfortranarray(array) if fortran and array.ndim else array
    read = decode_npy(saved(laid_out, version), LIMIT)
    assert read.dtype == array.dtype.newbyteorder("=")
    assert read.dtype.isnative
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, array, strict=False)
    assert read.shape == array.shape
    written = np.load(io.BytesIO(encode_npy(read)))
    assert written.tobytes() == read.tobytes()
    assert written.shape == array.shape


@given(
    hnp.arrays(np.object_, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0), elements=st.text(max_size=5))
)
def test_text_survives_except_nuls_at_its_end(texts: np.ndarray[Any, Any]) -> None:
    read = decode_npy(encode_npy(texts), LIMIT)
    assert read.dtype == np.object_
    assert read.shape == texts.shape
    assert [text.rstrip("\0") for text in texts.flat] == list(read.flat)


def test_bytes_are_read_as_utf8() -> None:
    assert decode_npy(saved(np.array(["é".encode(), b"a"])), LIMIT).tolist() == ["é", "a"]


@pytest.mark.parametrize(
    "array",
    [
        np.array([b"\xff"]),
        np.array([0xD800], np.uint32).view("U1"),
        np.array([0x110000], np.uint32).view("U1"),
    ],
)
def test_strings_that_are_not_unicode_are_refused(array: Any) -> None:
    with pytest.raises(InvalidInput, match="Unicode"):
        decode_npy(saved(array), LIMIT)


def test_an_array_in_native_order_is_a_view_of_the_body() -> None:
    body = saved(np.arange(1000, dtype=np.float32))
    assert np.shares_memory(decode_npy(body, LIMIT), np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    "descr", ["|O", "<c8", "<M8[s]", "|V8", "<f16", "<U0", "|S0", "<i3", "<f4,<f4", "<U9999999999"]
)
def test_dtypes_that_no_tensor_has_are_refused(descr: str) -> None:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (1000000000000,), }}"
    with pytest.raises(InvalidInput, match="dtype"):
        decode_npy(with_header(header), LIMIT)


def test_structures_and_pickles_are_refused() -> None:
    with pytest.raises(InvalidInput, match="structured"):
        decode_npy(saved(np.zeros(2, dtype=[("a", "<f4"), ("b", "<i4")])), LIMIT)
    with pytest.raises(InvalidInput, match="dtype"):
        decode_npy(saved(np.array([{}], dtype=object)), LIMIT)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPX\x01\x00",
        b"\x93NUMPY\x04\x00\x00\x00",
        b"\x93NUMPY\x01\x00\xff\x00{",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        with_header(""),
        with_header("{}"),
        with_header("{'descr': '<f4', 'fortran_order': False}"),
        with_header("{'descr': '<f4', 'fortran_order': 1, 'shape': ()}"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1 2)}"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 40 + ")}"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (0, " + "9" * 19 + ")}"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os')}"),
        with_header(" " * 4000 + "{" + " " * 90),
        saved(np.zeros(3))[:-1],
        saved(np.zeros(3)) + b"\0",
    ],
)
def test_a_damaged_or_incomplete_file_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        decode_npy(body, LIMIT)


@pytest.mark.parametrize("descr", ["<f8", "<U1", "|S1"])
def test_an_array_above_the_limit_is_refused_before_memory_is_allocated(descr: str) -> None:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (1000000, 1000000), }}"
    with pytest.raises(BodyTooLarge):
        decode_npy(with_header(header), LIMIT)


def test_a_byte_of_a_bool_must_be_0_or_1() -> None:
    body = saved(np.array([True, False]))
    with pytest.raises(InvalidInput, match="bool"):
        decode_npy(body[:-1] + b"\x02", LIMIT)


class TestNpz:
    def test_arrays_are_read_by_name_stored_or_deflated(self) -> None:
        arrays: dict[str, Any] = {
            "a/b:0": np.arange(3),
            "é": np.array([[1]], np.float32),
            "..": np.array("t", object),
        }
        file = io.BytesIO()
        np.savez_compressed(file, x=np.zeros(10_000))
        assert decode_npz(file.getvalue(), LIMIT)["x"].shape == (10_000,)
        read = decode_npz(encode_npz(arrays), LIMIT)
        assert list(read) == list(arrays)
        assert all((read[name] == array).all() for name, array in arrays.items())
        assert np.load(io.BytesIO(encode_npz(arrays)))["é"].tolist() == [[1]]

    def test_a_file_that_unpacks_above_the_limit_is_refused_before_it_is_unpacked(self) -> None:
        file = io.BytesIO()
        np.savez_compressed(file, x=np.zeros(LIMIT.most_bytes))
        assert len(file.getvalue()) < LIMIT.most_bytes / 8
        with pytest.raises(BodyTooLarge):
            decode_npz(file.getvalue(), LIMIT)

    def test_the_limit_is_for_all_members_together(self) -> None:
        half = np.zeros(LIMIT.most_bytes // 16 + 1024)
        with pytest.raises(BodyTooLarge):
            decode_npz(encode_npz({"a": half, "b": half}), LIMIT)

    def test_a_wrong_size_in_the_archive_is_malformed(self) -> None:
        body = encode_npz({"a": np.zeros(1000)})
        true, short = (size.to_bytes(4, "little") for size in (8128, 200))
        assert body.count(true) >= 2
        with pytest.raises(MalformedBody):
            decode_npz(body.replace(true, short), LIMIT)

    @pytest.mark.parametrize("flaw", ["name", "twice", "lzma", "encrypted", "garbage", "cut"])
    def test_a_damaged_npz_is_malformed(self, flaw: str) -> None:
        file = io.BytesIO()
        method = zipfile.ZIP_LZMA if flaw == "lzma" else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("x.txt" if flaw == "name" else "x.npy", saved(np.zeros(2)))
            if flaw == "twice":
                with pytest.warns(UserWarning, match="Duplicate"):
                    archive.writestr("x.npy", saved(np.zeros(2)))
        body = bytearray(file.getvalue())
        if flaw == "encrypted":
            body[6] |= 1
            body[body.index(b"PK\x01\x02") + 8] |= 1
        elif flaw == "garbage":
            body[60] ^= 1
        elif flaw == "cut":
            del body[-5:]
        with pytest.raises(MalformedBody):
            decode_npz(bytes(body), LIMIT)


def test_strings_of_very_different_lengths_are_refused_for_npy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy, "_MAX_TEXT_BYTES", 1000)
    with pytest.raises(ModelFailed):
        encode_npy(np.array(["a" * 100, *"bcde"], dtype=object))


def test_an_output_that_is_not_an_array_is_refused_for_npz() -> None:
    with pytest.raises(UnsupportedMediaType):
        encode_npz({"y": [{"a": 1.0}]})  # type: ignore[dict-item]


class TestCast:
    @staticmethod
    def to(datatype: str, array: Any) -> Any:
        return cast_to(TensorSpec("x", datatype, (ANY,) * np.ndim(array)), np.asanyarray(array))

    @pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i8", "u8"])
    def test_numbers_become_floats(self, datatype: str, dtype: str) -> None:
        assert self.to(datatype, np.array([1, 2], dtype)).dtype == DTYPES[datatype]

    def test_a_number_beyond_the_range_of_the_float_is_refused(self) -> None:
        with pytest.raises(InvalidInput) as caught:
            self.to("FP32", np.array([[np.nan, np.inf], [1, 1e39]]))
        assert caught.value.members["index"] == [1, 1]
        assert np.isnan(self.to("FP32", np.array([np.nan, np.inf]))[0])

    def test_integers_keep_their_value(self) -> None:
        assert self.to("INT8", np.array([-128, 127])).dtype == np.int8
        for datatype, value in (("INT8", 128), ("UINT8", -1), ("INT64", np.uint64(2**63))):
            with pytest.raises(InvalidInput, match="out of the range"):
                self.to(datatype, np.array([0, value]) if value != 2**63 else np.array([0, 2**63], np.uint64))

    @pytest.mark.parametrize(
        ("datatype", "array"),
        [
            ("INT64", np.array([1.0])),
            ("BOOL", np.array([1])),
            ("INT8", np.array([True])),
            ("FP32", np.array(["1"], object)),
            ("BYTES", np.array([1])),
            ("BF16", np.array([1], np.int32)),
        ],
    )
    def test_other_datatypes_are_not_cast(self, datatype: str, array: Any) -> None:
        with pytest.raises(InvalidInput, match=datatype):
            self.to(datatype, array)

    def test_bf16_is_taken_as_raw_bits(self) -> None:
        bits = np.array([0x3F80], np.uint16)
        assert self.to("BF16", bits) is bits

    def test_the_shape_is_checked(self) -> None:
        with pytest.raises(InvalidInput, match="shape"):
            cast_to(TensorSpec("x", "FP32", (2,)), np.zeros(3))
