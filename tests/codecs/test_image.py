"""Pictures become the tensors that Pillow and numpy, used by hand, would make of them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.codecs.image import ImageCodec
from inferpool.codecs.image_config import ImageConfig
from inferpool.codecs.image_files import OTHER_FORMATS, PNG_SIGNATURE
from inferpool.errors import BodyTooLarge, ConfigError, MalformedBody, UnsupportedMediaType
from inferpool.tensors import ANY, Array, Signature, TensorSpec
from PIL import Image, ImageOps
from pydantic import ValidationError

FORMATS = ("PNG", "JPEG", "WEBP")


def signature(*shape: int, datatype: str = "FP32") -> Signature:
    return Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", "FP32", (ANY, 10)),))


def codec(*shape: int, datatype: str = "FP32", **config: Any) -> ImageCodec:
    return ImageCodec(ImageConfig(**config), signature(*shape, datatype=datatype))


def raw_codec(height: int, width: int, **config: Any) -> ImageCodec:
    """A codec that changes no colour: what it gives are the pixels, height × width × 3."""
    return codec(ANY, height, width, 3, datatype="UINT8", layout="HWC", **config)


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Array:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def by_hand(image: Image.Image, size: tuple[int, int], resize: int | None) -> Array:
    """torchvision's Resize and CenterCrop, step by step as its documentation has them."""
    height, width = size
    if resize is None:
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    short, long = sorted(image.size)
    new_short, new_long = resize, int(resize * long / short)
    new_size = (new_short, new_long) if image.width <= image.height else (new_long, new_short)
    pixels = np.asarray(image.resize(new_size, Image.Resampling.BILINEAR))
    missing = [max(wanted - have, 0) for wanted, have in zip(size, pixels.shape, strict=False)]
    pixels = np.pad(pixels, [(m // 2, (m + 1) // 2) for m in missing] + [(0, 0)] * (pixels.ndim - 2))
    top, left = round((pixels.shape[0] - height) / 2.0), round((pixels.shape[1] - width) / 2.0)
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_decoded_like_pillow_does(format: str) -> None:
    body = file_of(Image.fromarray(noise(13, 17)), format)
    expected = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
    np.testing.assert_array_equal(raw_codec(13, 17).decode(body)["x"], expected[np.newaxis])


@given(
    picture=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_resize_and_crop_match_torchvision(
    picture: tuple[int, int], size: tuple[int, int], resize: int | None, seed: int
) -> None:
    image = Image.fromarray(noise(*picture, seed=seed))
    got = raw_codec(ANY, ANY, size=size, resize=resize).decode(file_of(image))["x"]
    np.testing.assert_array_equal(got[0], by_hand(image, size, resize))


def test_imagenet_preprocessing_matches_numpy() -> None:
    """The preparation that most published classifiers were trained with."""
    image = Image.fromarray(noise(300, 400))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = codec(ANY, 3, 224, 224, resize=256, mean=mean, std=std).decode(file_of(image))["x"]
    pixels = by_hand(image, (224, 224), 256).astype(np.float64) / 255
    expected = ((pixels - mean) / std).transpose(2, 0, 1)[np.newaxis]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous


@pytest.mark.parametrize(
    ("layout", "mode", "shape"),
    [
        ("CHW", "rgb", (ANY, 3, 4, 5)),
        ("HWC", "rgb", (ANY, 4, 5, 3)),
        ("CHW", "grey", (ANY, 1, 4, 5)),
        ("HWC", "grey", (1, 4, 5, 1)),
        ("HW", "grey", (ANY, 4, 5)),
    ],
)
def test_every_layout_is_one_contiguous_row(layout: str, mode: str, shape: tuple[int, ...]) -> None:
    image = Image.fromarray(noise(4, 5))
    row = codec(*shape, layout=layout, mode=mode).decode(file_of(image))["x"]
    assert row.shape == (1, *shape[1:])
    assert row.flags.c_contiguous
    pixels = np.asarray(image.convert("L" if mode == "grey" else "RGB"))
    expected = pixels.transpose(2, 0, 1) if (layout, mode) == ("CHW", "rgb") else pixels
    np.testing.assert_allclose(row[0], expected.reshape(shape[1:]) / 255, rtol=1e-6)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_floats_are_rounded_once(datatype: str) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    made = codec(ANY, 16, 16, datatype=datatype, layout="HW", mode="grey", mean=0.5, std=0.25)
    row = made.decode(file_of(Image.fromarray(pixels)))["x"]
    expected = (pixels * (1 / 255) - 0.5) / 0.25
    np.testing.assert_array_equal(row[0], expected.astype(row.dtype))
    assert row.dtype == np.dtype(datatype.lower().replace("fp", "float"))


def test_bfloat16_is_rounded_to_nearest() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    row = codec(ANY, 16, 16, datatype="BF16", layout="HW", mode="grey").decode(
        file_of(Image.fromarray(pixels))
    )["x"]
    every = (np.arange(0x3F81, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    exact = pixels.ravel() * (1 / 255)
    nearest = np.abs(every[np.newaxis] - exact[:, np.newaxis]).min(axis=1)
    got = (row.astype(np.uint32) << 16).view(np.float32).astype(np.float64).ravel()
    np.testing.assert_allclose(np.abs(got - exact), nearest, atol=1e-9)


@pytest.mark.parametrize("datatype", ["UINT8", "UINT16", "INT16", "INT32", "INT64", "UINT32", "UINT64"])
def test_integers_are_unchanged_pixels(datatype: str) -> None:
    pixels = noise(3, 4, channels=1)
    made = codec(ANY, 3, 4, datatype=datatype, layout="HW", mode="grey")
    row = made.decode(file_of(Image.fromarray(pixels)))["x"]
    np.testing.assert_array_equal(row[0], pixels)
    assert row.dtype == np.dtype(datatype.lower())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format: str, orientation: int) -> None:
    image = Image.fromarray(noise(5, 7))
    exif = Image.Exif()
    exif[0x010E] = "a description, so that the orientation is not the first entry"
    exif[0x0112] = orientation
    body = file_of(image, format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB"))
    np.testing.assert_array_equal(raw_codec(*expected.shape[:2]).decode(body)["x"][0], expected)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"nonsense",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x011A, 5, 1, 0xFFFFFFF0),
        b"II\0*" + b"\0" * 20,
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_exif_is_ignored(format: str, exif: bytes) -> None:
    image = Image.fromarray(noise(5, 7))
    if format == "JPEG":
        bare = file_of(image, format)
        segment = b"Exif\0\0" + exif
        body = bare[:2] + struct.pack(">HH", 0xFFE1, len(segment) + 2) + segment + bare[2:]
    else:
        body = file_of(image, format, exif=exif)
    expected = raw_codec(5, 7).decode(file_of(image, format))["x"]
    np.testing.assert_array_equal(raw_codec(5, 7).decode(body)["x"], expected)


def test_colour_profile_and_comments_are_ignored() -> None:
    image = Image.fromarray(noise(5, 7))
    plain = raw_codec(5, 7).decode(file_of(image, "JPEG"))["x"]
    noted = file_of(image, "JPEG", icc_profile=b"not a profile" * 9, comment=b"hello", xmp=b"<x/>")
    np.testing.assert_array_equal(raw_codec(5, 7).decode(noted)["x"], plain)


def test_fill_bytes_between_jpeg_segments_are_skipped() -> None:
    image = Image.fromarray(noise(5, 7))
    body = file_of(image, "JPEG")
    filled = body[:2] + b"\xff\xff\xff" + body[2:]
    np.testing.assert_array_equal(raw_codec(5, 7).decode(filled)["x"], raw_codec(5, 7).decode(body)["x"])


def png_file(samples: Array, depth: int, colour: int, *, palette: bytes = b"", clear: bytes = b"") -> bytes:
    """A PNG of any kind, written by the specification: `samples` are rows × columns × channels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = samples.shape
    bits = np.unpackbits(samples.astype(">u2")[..., np.newaxis].view(np.uint8), axis=-1)
    rows = np.packbits(bits[..., 16 - depth :].reshape(height, -1), axis=-1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    body = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    )
    body += chunk(b"PLTE", palette) if palette else b""
    body += chunk(b"tRNS", clear) if clear else b""
    return body + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def over_white(colours: Array, alpha: Array) -> Array:
    """Colours of 0 to 255 laid on white, exactly."""
    return 255 + (colours - 255.0) * alpha[..., np.newaxis] / 255


@pytest.mark.parametrize("clear", [False, True], ids=["opaque", "one-colour-clear"])
@pytest.mark.parametrize(
    ("colour", "depth"),
    [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)],
)
def test_every_kind_of_png_is_decoded(colour: int, depth: int, clear: bool) -> None:
    channels = 3 if colour == 2 else 1
    samples = np.random.default_rng(depth).integers(0, 2**depth, (6, 9, channels)).astype(np.uint16)
    samples[0, 0] = 0
    # The same high byte as the clear colour; in grey, all 16 bits are compared.
    samples[0, 1] = 1
    palette = np.random.default_rng(colour).integers(0, 256, (2**depth, 3), dtype=np.uint8)
    clear_bytes = (b"\0" if colour == 3 else b"\0\0" * channels) if clear else b""
    body = png_file(
        samples, depth, colour, palette=palette.tobytes() if colour == 3 else b"", clear=clear_bytes
    )
    if colour == 3:
        colours = palette[samples[..., 0]]
    else:
        eight = samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1))
        colours = np.broadcast_to(eight, (6, 9, 3))
    compared = samples >> 8 if (colour, depth) == (2, 16) else samples
    alpha = np.where((compared == 0).all(axis=-1) & clear, 0, 255)
    expected = over_white(colours.astype(float), alpha)
    got = raw_codec(6, 9).decode(body)["x"][0]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("colour", "depth"), [(4, 8), (4, 16), (6, 8), (6, 16)])
def test_transparency_is_laid_on_white(colour: int, depth: int) -> None:
    channels = 2 if colour == 4 else 4
    samples = np.random.default_rng(1).integers(0, 2**depth, (16, 16, channels)).astype(np.uint16)
    eight = samples >> (depth - 8)
    expected = over_white(np.broadcast_to(eight[..., :-1], (16, 16, 3)).astype(float), eight[..., -1])
    got = raw_codec(16, 16).decode(png_file(samples, depth, colour))["x"][0]
    np.testing.assert_allclose(got, expected, atol=1)


def test_webp_transparency_is_laid_on_white() -> None:
    pixels = noise(8, 8, channels=4)
    body = file_of(Image.fromarray(pixels), "WEBP", lossless=True, exact=True)
    got = raw_codec(8, 8).decode(body)["x"][0]
    np.testing.assert_allclose(got, over_white(pixels[..., :3].astype(float), pixels[..., 3]), atol=1)


@pytest.mark.parametrize("mode", ["rgb", "grey"])
def test_a_cmyk_jpeg_is_decoded(mode: str) -> None:
    image = Image.fromarray(noise(8, 8)).convert("CMYK")
    body = file_of(image, "JPEG", quality=95)
    expected = np.asarray(
        Image.open(io.BytesIO(body)).convert("RGB").convert("L" if mode == "grey" else "RGB")
    )
    channels = 1 if mode == "grey" else 3
    got = codec(ANY, 8, 8, channels, datatype="UINT8", layout="HWC", mode=mode).decode(body)["x"]
    np.testing.assert_array_equal(got[0], expected.reshape(8, 8, channels))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_decoded(format: str) -> None:
    frames = [Image.fromarray(noise(6, 6, seed=seed)) for seed in range(3)]
    body = file_of(frames[0], format, save_all=True, append_images=frames[1:], lossless=True, duration=10)
    got = raw_codec(6, 6).decode(body)["x"][0]
    np.testing.assert_array_equal(got, np.asarray(frames[0]))


@pytest.mark.parametrize(("start", "signature", "name"), OTHER_FORMATS)
def test_other_formats_are_refused_by_name(start: int, signature: bytes, name: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=f"is {name}; PNG, JPEG and WebP are taken") as refused:
        raw_codec(4, 4).decode(b"\0" * start + signature + b"\0" * 60)
    assert refused.value.members["expected"] == ["image/png", "image/jpeg", "image/webp"]


@pytest.mark.parametrize("body", [b"notapng", b"{}", b"RIFF\0\0\0\0WAVE", PNG_SIGNATURE[1:], b"\xff"])
def test_a_body_that_is_not_a_picture_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="not a picture"):
        raw_codec(4, 4).decode(body)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM"])
def test_pillow_never_gets_other_formats(format: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        raw_codec(4, 4).decode(file_of(Image.fromarray(noise(4, 4)), format))


def test_an_empty_body_is_malformed() -> None:
    with pytest.raises(MalformedBody, match="empty"):
        raw_codec(4, 4).decode(b"")


@pytest.mark.parametrize("format", FORMATS)
def test_every_truncation_is_refused(format: str) -> None:
    body = file_of(Image.fromarray(noise(9, 9)), format)
    # The picture is whole without what closes a file: a PNG's checksums and IEND, a JPEG's EOI.
    for length in range(1, len(body) - 32, 3):
        with pytest.raises((MalformedBody, UnsupportedMediaType)):
            raw_codec(9, 9).decode(body[:length])


HUGE = {
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 50_000, 50_000) + b"\x08\x02\0\0\0\0\0\0\0",
    "jpeg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 65_000, 65_000, 1) + b"\x01\x11\0\xff\xda",
    "webp-extended": b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2,
    "webp-lossless": b"RIFF\xff\0\0\0WEBPVP8L\xff\0\0\0\x2f" + struct.pack("<I", 0x0FFFFFFF),
    "webp-lossy": b"RIFF\xff\0\0\0WEBPVP8 \xff\0\0\0\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f",
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_picture_with_too_many_pixels_is_refused_by_its_header(kind: str) -> None:
    with pytest.raises(BodyTooLarge, match="at most 50000000 are taken"):
        raw_codec(4, 4).decode(HUGE[kind])


def test_a_larger_second_header_is_refused() -> None:
    body = file_of(Image.fromarray(noise(4, 4)))
    small, huge = body[8:33], HUGE["png"][8:29]
    smuggled = body[:8] + small + huge + struct.pack(">I", zlib.crc32(huge[4:])) + body[33:]
    with pytest.raises(BodyTooLarge):
        raw_codec(4, 4).decode(smuggled)


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
    """A column one pixel wide, stretched to a square, passes through a picture far larger than either."""
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
    file_of(Image.fromarray(noise(5, 5)), "PNG", save_all=True, append_images=[Image.new("RGB", (5, 5))]),
]


def check_outcome(body: bytes) -> None:
    """One row of the right kind, or one of the three errors; no warning either way."""
    made = codec(ANY, 3, 8, 8, resize=9, max_pixels=10_000)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        try:
            row = made.decode(body)["x"]
        except (MalformedBody, BodyTooLarge, UnsupportedMediaType):
            row = None
    assert [str(warning.message) for warning in leaked] == []
    if row is not None:
        assert row.shape == (1, 3, 8, 8)
        assert np.isfinite(row).all()


@given(
    prefix=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", *HUGE.values()]),
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
    for place, removed, added in edits:
        at = int(place * place * len(body))
        body = body[:at] + added + body[at + removed :]
    check_outcome(body[: int(tail * len(body))])


TWO_INPUTS = Signature((TensorSpec("x", "FP32", (ANY, 3, 8, 8)), TensorSpec("mask", "FP32", (ANY, 8, 8))), ())


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((ANY, 3, 8, 8), {"input": "y"}, 'image.input: no input is called "y"'),
        ((ANY, 1, 8, 8), {}, "image.mode: "),
        ((ANY, 3, 8, 8), {"layout": "HWC"}, "image.mode: "),
        ((ANY, 3, 8, 8), {"layout": "HW", "mode": "grey"}, 'image.layout: "HW" after the rows makes 3'),
        ((ANY, 8, 8), {"layout": "HW"}, 'image.layout: "HW" has no room for colours'),
        ((3, 8, 8), {}, 'image.layout: "CHW" after the rows makes 4 dimensions'),
        ((4, 3, 8, 8), {}, "image.input: a picture makes one row"),
        ((ANY, 3, 8, 8), {"size": (8, 9)}, r"image.size: \[8, 9\] does not fit"),
        ((ANY, 3, ANY, 8), {}, "image.size: must be given"),
        ((ANY, 3, ANY, ANY), {"size": (80, 90), "max_pixels": 7199}, "image.size: 80×90 is more than"),
        ((ANY, 3, 8, 8), {"mean": (0.5,)}, r"image.mean: 1 numbers for 3 channel\(s\)"),
        ((ANY, 3, 8, 8), {"std": (1.0, 0.0, 1.0)}, "image.std: must not be 0"),
        ((ANY, 3, 8, 8), {"scale": 1e38}, "image.scale: .* too large for FP32"),
    ],
)
def test_contradictions_are_refused_with_the_key(
    shape: tuple[int, ...], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        codec(*shape, **config)


@pytest.mark.parametrize("key", ["scale", "mean", "std"])
def test_integers_are_not_scaled(key: str) -> None:
    with pytest.raises(ConfigError, match=f'^image.{key}: "x" is UINT8'):
        codec(ANY, 3, 8, 8, datatype="UINT8", **{key: 1.0})


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES", "INT8"])
def test_an_input_that_cannot_hold_pixels_is_refused(datatype: str) -> None:
    with pytest.raises(ConfigError, match=f'^image.input: "x" is {datatype}'):
        codec(ANY, 3, 8, 8, datatype=datatype)


def test_one_of_several_inputs_must_be_named_and_the_others_be_optional() -> None:
    with pytest.raises(
        ConfigError, match=r'^image.input: must be given, because the model takes "x", "mask"'
    ):
        ImageCodec(ImageConfig(), TWO_INPUTS)
    with pytest.raises(ConfigError, match=r'^image.input: the model also needs "mask"'):
        ImageCodec(ImageConfig(input="x"), TWO_INPUTS)


def test_an_optional_input_is_left_out() -> None:
    spared = Signature((TWO_INPUTS.inputs[0], TensorSpec("mask", "FP32", (ANY, 8, 8), optional=True)), ())
    assert ImageCodec(ImageConfig(), spared).decode(file_of(Image.new("RGB", (8, 8)))).keys() == {"x"}


def test_an_input_of_unknown_rank_takes_the_configured_size() -> None:
    unknown = Signature((TensorSpec("x", "FP32", None),), ())
    made = ImageCodec(ImageConfig(size=(4, 6)), unknown)
    assert made.decode(file_of(Image.new("RGB", (9, 9))))["x"].shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    "config",
    [
        {"sise": (1, 1)},
        {"size": (0, 4)},
        {"resize": 0},
        {"scale": float("nan")},
        {"max_pixels": 0},
        {"mode": "bgr"},
    ],
)
def test_invalid_values_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageConfig(**config)
