"""AVIF pictures have the pixels that Pillow reads, and cost no more than their size says."""

from __future__ import annotations

import contextlib
import io
import struct

import numpy as np
import pytest
from inferpool.codecs.avif import decode_avif
from inferpool.codecs.avif_file import _write, has_alpha, open_avif
from inferpool.codecs.image_container import HAS_AVIF
from inferpool.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType
from PIL import Image

from tests.codecs.pictures import file_of, noise, raw_codec

pytestmark = pytest.mark.skipif(not HAS_AVIF, reason="this Pillow brings no libavif")


def avif(
    height: int = 17, width: int = 33, channels: int = 3, orientation: int = 1, **options: object
) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(noise(height, width, channels))
    return file_of(image, "AVIF", speed=10, exif=exif, **options)


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4", "4:0:0"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (120, 301)])
def test_the_pixels_are_those_that_pillow_reads(
    size: tuple[int, int], channels: int, subsampling: str
) -> None:
    for premultiplied in [False, True][: channels - 2]:
        data = avif(*size, channels, subsampling=subsampling, alpha_premultiplied=premultiplied)
        opened, expected = open_avif(data), Image.open(io.BytesIO(data))
        assert (opened.width, opened.height) == expected.size
        assert has_alpha(opened.pixels) == (channels == 4)
        decoded = decode_avif(opened.pixels, opened.width, opened.height)
        assert np.array_equal(np.asarray(decoded.convert(expected.mode)), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_that_of_the_container(orientation: int) -> None:
    assert open_avif(avif(orientation=orientation)).orientation == orientation


def test_of_an_animation_the_first_frame_is_decoded() -> None:
    first, second = Image.fromarray(noise(16, 16)), Image.fromarray(noise(16, 16, seed=1))
    data = file_of(first, "AVIF", save_all=True, append_images=[second])
    got = raw_codec(16, 16).decode(data)["x"][0]
    assert np.array_equal(got, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_frame_that_is_larger_than_its_container_says_is_refused() -> None:
    small, large = avif(8, 8), avif(512, 512)
    size = struct.pack(">II", 512, 512)
    assert size in large
    bomb = large.replace(size, struct.pack(">II", 8, 8))
    with pytest.raises(MalformedBody, match="damaged"):
        raw_codec(8, 8).decode(bomb)
    assert raw_codec(8, 8).decode(small)["x"].shape == (1, 8, 8, 3)


def test_a_picture_with_too_many_pixels_is_refused_by_its_header() -> None:
    huge = avif(9, 9).replace(struct.pack(">II", 9, 9), struct.pack(">II", 60_000, 60_000))
    with pytest.raises(BodyTooLarge, match="at most 50000000 are taken"):
        raw_codec(9, 9).decode(huge)


def frame_of(data: bytes) -> bytes:
    """The OBUs of an opaque picture, as they are written anew: the last box of the file."""
    written = open_avif(data).pixels
    return written[written.index(b"mdat") + 4 :]


def test_several_frames_in_one_picture_are_refused() -> None:
    frame = frame_of(avif(9, 9))
    configuration = b"\x81\0\x0c\0"
    assert open_avif(_write(9, 9, [(configuration, [frame], None)], premultiplied=False)).width == 9
    with pytest.raises(UnsupportedMediaType, match="layers"):
        open_avif(_write(9, 9, [(configuration, [frame, frame], None)], premultiplied=False))


def test_a_file_of_many_parts_is_refused() -> None:
    data = avif(9, 9)
    free = struct.pack(">I4s", 8, b"free")
    with pytest.raises(BodyTooLarge, match="parts"):
        raw_codec(9, 9).decode(data[:32] + 2000 * free + data[32:])


def test_pixels_outside_the_file_are_malformed() -> None:
    data = avif(9, 9)
    at = data.index(b"iloc") + 12
    # Of the only item: its number, a reference, a count of extents, and where the first one begins.
    with pytest.raises(MalformedBody, match="outside"):
        open_avif(data[: at + 8] + b"\xff\xff\xff\0" + data[at + 12 :])


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_one_of_three_errors(seed: int) -> None:
    source = np.random.default_rng(seed)
    data = bytearray(avif(9, 9, 4, orientation=7))
    for _ in range(source.integers(1, 4)):
        data[source.integers(len(data))] = source.choice([0, 1, 127, 255])
    with contextlib.suppress(MalformedBody, UnsupportedMediaType, BodyTooLarge):
        raw_codec(9, 9).decode(bytes(data[: source.integers(40, len(data) + 400)]))


def test_a_picture_of_several_tiles_is_refused() -> None:
    data = avif(9, 9)
    with pytest.raises(UnsupportedMediaType, match="several tiles"):
        open_avif(data.replace(b"av01Color", b"gridColor"))
