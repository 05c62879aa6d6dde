"""Pictures become the same tensors that Pillow and numpy give step by step."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferpool.tensors import ANY, Array
from PIL import Image, ImageOps

from tests.codecs.pictures import FORMATS, codec, file_of, noise, raw_codec


def by_hand(image: Image.Image, size: tuple[int, int], resize: int | None) -> Array:
    """Return what torchvision's Resize and CenterCrop give, step by step as in its documentation."""
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
    """Most published classifiers were trained with this preprocessing."""
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
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
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
    described = file_of(image, "JPEG", icc_profile=b"not a profile" * 9, comment=b"hello", xmp=b"<x/>")
    np.testing.assert_array_equal(raw_codec(5, 7).decode(described)["x"], plain)


def test_fill_bytes_between_jpeg_segments_are_skipped() -> None:
    image = Image.fromarray(noise(5, 7))
    body = file_of(image, "JPEG")
    filled = body[:2] + b"\xff\xff\xff" + body[2:]
    np.testing.assert_array_equal(raw_codec(5, 7).decode(filled)["x"], raw_codec(5, 7).decode(body)["x"])


def png_file(samples: Array, depth: int, colour: int, *, palette: bytes = b"", clear: bytes = b"") -> bytes:
    """Return a PNG of any kind, written by the specification; `samples` are rows × columns × channels."""

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
    """Return colours of 0 to 255 on white, without rounding."""
    return 255 + (colours - 255.0) * alpha[..., np.newaxis] / 255


@pytest.mark.parametrize("clear", [False, True], ids=["opaque", "one-colour-transparent"])
@pytest.mark.parametrize(
    ("colour", "depth"),
    [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)],
)
def test_every_kind_of_png_is_decoded(colour: int, depth: int, clear: bool) -> None:
    channels = 3 if colour == 2 else 1
    samples = np.random.default_rng(depth).integers(0, 2**depth, (6, 9, channels)).astype(np.uint16)
    samples[0, 0] = 0
    # This has the same high byte as the transparent colour; in grey, all 16 bits are compared.
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
