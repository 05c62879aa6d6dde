"""WebP pictures have the pixels that Pillow reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL
import pytest
from inferpool.codecs.webp import decode_webp
from PIL import Image

IS_WHEEL = (Path(PIL.__file__).parent.parent / "pillow.libs").is_dir()
pytestmark = pytest.mark.skipif(
    not IS_WHEEL, reason="this Pillow is not a wheel for Linux: it brings no libwebp"
)


def webp(mode: str, size: tuple[int, int], *, lossless: bool) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    if mode == "RGBA":
        values[::2, :, 3] = 0
    file = io.BytesIO()
    Image.fromarray(values).save(file, "WEBP", lossless=lossless)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (33, 17), (501, 333)])
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_pixels_are_those_that_pillow_reads(mode: str, lossless: bool, size: tuple[int, int]) -> None:
    data = webp(mode, size, lossless=lossless)
    decoded, expected = decode_webp(data, *size), Image.open(io.BytesIO(data))
    assert decoded is not None
    assert (decoded.mode, decoded.size) == (expected.mode, expected.size) == (mode, size)
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


def test_an_animated_picture_is_left_to_pillow() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    assert decode_webp(file.getvalue(), 8, 8) is None


@pytest.mark.parametrize("kept", [12, 20, 40, 200])
def test_a_picture_that_is_cut_short_is_an_error(kept: int) -> None:
    data = webp("RGB", (33, 17), lossless=True)
    assert len(data) > kept
    with pytest.raises(ValueError, match="damaged"):
        decode_webp(data[:kept], 33, 17)


def test_a_picture_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="33×17 pixels, not 1×1"):
        decode_webp(webp("RGB", (33, 17), lossless=False), 1, 1)
