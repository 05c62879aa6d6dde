"""Files that are damaged, too large or of other formats are refused with one of three errors."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.codecs.image_container import MEDIA_TYPES
from inferpool.codecs.image_files import OTHER_FORMATS, PNG_SIGNATURE
from inferpool.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType
from inferpool.tensors import ANY
from PIL import Image

from tests.codecs.pictures import FORMATS, codec, file_of, noise, raw_codec

RGB = Image.fromarray(noise(4, 4))


@pytest.mark.parametrize(("start", "signature", "name"), OTHER_FORMATS)
def test_other_formats_are_refused_by_name(start: int, signature: bytes, name: str) -> None:
    with pytest.raises(
        UnsupportedMediaType, match=f"is {name}; PNG, JPEG, WebP, GIF, BMP.* are taken"
    ) as refused:
        raw_codec(4, 4).decode(b"\0" * start + signature + b"\0" * 60)
    assert refused.value.members["expected"] == [*MEDIA_TYPES]


@pytest.mark.parametrize("body", [b"notapng", b"{}", b"RIFF\0\0\0\0WAVE", PNG_SIGNATURE[1:], b"\xff"])
def test_a_body_that_is_not_a_picture_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="not a picture"):
        raw_codec(4, 4).decode(body)


def test_pillow_never_gets_other_formats() -> None:
    with pytest.raises(UnsupportedMediaType):
        raw_codec(4, 4).decode(file_of(Image.fromarray(noise(4, 4)), "PPM"))


@pytest.mark.parametrize(
    "body",
    [
        file_of(RGB, "TIFF", compression="jpeg"),
        file_of(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        file_of(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"),
        b"BM" + b"\0" * 12 + struct.pack("<IiiHHI", 40, 4, 4, 1, 8, 1) + b"\0" * 60,
    ],
    ids=["TIFF with JPEG", "TIFF of floats", "TIFF of 32 bits", "BMP with run lengths"],
)
def test_pixels_whose_cost_is_not_known_are_refused_by_name(body: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match="save it"):
        raw_codec(4, 4).decode(body)


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """Return a TIFF file with these tags: a name, a type, a number of values, and a value or its place."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 64


GIF = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0)
SIZE_TAGS = ((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (tiff(*SIZE_TAGS, (273, 4, 2**31, 8), (279, 4, 1, 64)), BodyTooLarge),
        (tiff(*SIZE_TAGS, (273, 4, 60_000, 8), (279, 4, 1, 64)), MalformedBody),
        (tiff(*SIZE_TAGS, (273, 12, 1, 8), (279, 4, 1, 64)), MalformedBody),
        (tiff(*SIZE_TAGS, (322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8)), BodyTooLarge),
        (GIF + b"\x2c" + struct.pack("<HHHHB", 0, 0, 9, 8, 0), MalformedBody),
        (GIF + b"\x3b", MalformedBody),
        (GIF + b"\x21\xfe" + b"\1c" * 70_000, BodyTooLarge),
    ],
    ids=["strips without end", "strips outside", "a type of floats", "a huge tile", "a frame outside",
         "no frame", "comments without end"],
)  # fmt: skip
def test_files_that_would_take_more_than_their_size_says_are_refused(
    body: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        raw_codec(8, 8).decode(body)


def test_decoding_writes_nothing_to_the_log_of_the_server(capfd: pytest.CaptureFixture[str]) -> None:
    body = bytearray(file_of(Image.fromarray(noise(40, 30)), "TIFF", compression="tiff_lzw"))
    body[100:2000] = b"\xff" * 1900
    with pytest.raises(MalformedBody):
        raw_codec(40, 30).decode(bytes(body))
    assert capfd.readouterr().err == ""


def test_an_empty_body_is_malformed() -> None:
    with pytest.raises(MalformedBody, match="empty"):
        raw_codec(4, 4).decode(b"")


@pytest.mark.parametrize("format", FORMATS)
def test_every_truncation_is_refused(format: str) -> None:
    body = file_of(Image.fromarray(noise(9, 9)), format)
    # The last bytes are not needed to decode: the checksums and IEND of a PNG, the EOI of a JPEG.
    for length in range(1, len(body) - 32, 3):
        with pytest.raises((MalformedBody, UnsupportedMediaType)):
            raw_codec(9, 9).decode(body[:length])


HUGE = {
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 50_000, 50_000) + b"\x08\x02\0\0\0\0\0\0\0",
    "jpeg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 65_000, 65_000, 1) + b"\x01\x11\0\xff\xda",
    "webp-extended": b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2,
    "webp-lossless": b"RIFF\xff\0\0\0WEBPVP8L\xff\0\0\0\x2f" + struct.pack("<I", 0x0FFFFFFF),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"\x2c" + b"\0" * 9,
    "bmp": b"BM" + b"\0" * 12 + struct.pack("<IiiHHI", 40, 60_000, -60_000, 1, 24, 0),
    "tiff": tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000)),
    "webp-lossy": b"RIFF\xff\0\0\0WEBPVP8 \xff\0\0\0\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f",
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_picture_with_too_many_pixels_is_refused_by_its_header(kind: str) -> None:
    with pytest.raises(BodyTooLarge, match="at most 50000000 are taken"):
        raw_codec(4, 4).decode(HUGE[kind])


def test_a_larger_second_header_is_refused() -> None:
    body = file_of(Image.fromarray(noise(4, 4)))
    small, huge = body[8:33], HUGE["png"][8:29]
    doubled = body[:8] + small + huge + struct.pack(">I", zlib.crc32(huge[4:])) + body[33:]
    with pytest.raises(BodyTooLarge):
        raw_codec(4, 4).decode(doubled)


def test_a_jpeg_with_too_many_scans_is_refused() -> None:
    body = file_of(Image.fromarray(noise(8, 8)), "JPEG", progressive=True)
    last_scan = body[body.rindex(b"\xff\xda") : -2]
    made = raw_codec(8, 8)
    assert made.decode(body)["x"].shape == (1, 8, 8, 3)
    with pytest.raises(BodyTooLarge, match="scans; at most 100"):
        made.decode(body[:-2] + last_scan * 100 + body[-2:])


def test_a_picture_of_exactly_the_limit_is_taken() -> None:
    body = file_of(Image.fromarray(noise(10, 10)))
    assert raw_codec(10, 10, max_pixels=100).decode(body)["x"].shape == (1, 10, 10, 3)
    with pytest.raises(BodyTooLarge):
        raw_codec(9, 9, max_pixels=99).decode(body)


def test_a_picture_that_grows_too_large_during_the_resize_is_refused() -> None:
    """A column of one pixel that becomes a square is much larger between the two steps of the resize."""
    body = file_of(Image.fromarray(noise(2000, 1)))
    with pytest.raises(BodyTooLarge):
        raw_codec(8, 8, max_pixels=15_000).decode(body)
    with pytest.raises(BodyTooLarge):
        raw_codec(8, 8, resize=8, max_pixels=100_000).decode(body)


@pytest.mark.parametrize(("width", "height"), [(0, 4), (4, 0)])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_picture_of_width_or_height_0_is_malformed(format: str, width: int, height: int) -> None:
    body = {
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0",
        "jpeg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\0\xff\xda",
        "webp": b"RIFF\xff\0\0\0WEBPVP8 \xff\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
    }[format]
    with pytest.raises(MalformedBody, match="size is"):
        raw_codec(4, 4).decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIDAT" + b"\0" * 20,
        b"\xff\xd8\xff\xe0\0\x04\0\0\x12\x34",
        b"\xff\xd8\xff\xda\0\x04\0\0",
        b"\xff\xd8\xff\xd0\x01\x02",
        b"RIFF\xff\0\0\0WEBPICCP" + b"\0" * 20,
    ],
)
def test_damaged_headers_are_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        raw_codec(4, 4).decode(body)


def test_a_picture_that_exhausts_memory_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(_: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", exhausted)
    with pytest.raises(BodyTooLarge, match="memory"):
        raw_codec(4, 4).decode(file_of(Image.fromarray(noise(4, 4))))


BODIES = [
    *(file_of(Image.fromarray(noise(11, 7)), format) for format in FORMATS),
    file_of(Image.fromarray(noise(11, 7)), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"),
    file_of(Image.fromarray(noise(11, 7)).convert("P"), "PNG", transparency=3),
    file_of(Image.fromarray(noise(11, 7, channels=4)), "WEBP", lossless=True, exif=b"MM\0*\0\0\0\x08\0\x01"),
    file_of(Image.fromarray(noise(11, 7)).convert("CMYK"), "JPEG"),
    *(
        file_of(Image.fromarray(noise(11, 7)), "TIFF", compression=kind)
        for kind in ("raw", "tiff_lzw", "packbits")
    ),
    file_of(Image.fromarray(noise(11, 7)).convert("1"), "TIFF", compression="group4"),
    file_of(Image.fromarray(noise(11, 7)).quantize(16), "GIF", transparency=3, comment=b"c"),
    *(file_of(Image.fromarray(noise(11, 7)).convert(mode), "BMP") for mode in ("1", "P", "RGB", "RGBA")),
    file_of(Image.fromarray(noise(5, 5)), "PNG", save_all=True, append_images=[Image.new("RGB", (5, 5))]),
]


def check_outcome(body: bytes) -> None:
    """Decode `body`: the outcome is a valid row or one of the three errors, and no warning."""
    made = codec(ANY, 3, 8, 8, resize=9, max_pixels=10_000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            row = made.decode(body)["x"]
        except (MalformedBody, BodyTooLarge, UnsupportedMediaType):
            row = None
    assert [str(warning.message) for warning in caught] == []
    if row is not None:
        assert row.shape == (1, 3, 8, 8)
        assert np.isfinite(row).all()


@given(
    prefix=st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"RIFF\0\0\0\0WEBP",
            b"GIF89a",
            b"BM",
            b"II*\0\x08\0\0\0",
            *HUGE.values(),
        ]
    ),
    rest=st.binary(max_size=200),
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_decoded_or_refused(prefix: bytes, rest: bytes) -> None:
    check_outcome(prefix + rest)


@given(
    body=st.sampled_from(BODIES),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=6)), min_size=1, max_size=6
    ),
    tail=st.floats(0, 1) | st.just(1.0),
)
@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_pictures_are_decoded_or_refused(
    body: bytes, edits: list[tuple[float, int, bytes]], tail: float
) -> None:
    for position, removed, added in edits:
        at = int(position * position * len(body))
        body = body[:at] + added + body[at + removed :]
    check_outcome(body[: int(tail * len(body))])
