"""Decodes WebP pictures without the GIL.

Pillow's decoder copies all pixels of a picture at once while it holds the GIL. For 16 million pixels, that
is 64 MB, and no other thread of the server does anything for 50 ms. So the libwebp that Pillow's wheels bring
is called directly; its functions are those of https://developers.google.com/speed/webp/docs/api.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import PIL
from PIL import Image

_ABI_VERSION: Final = 0x0209
"""The version of `WebPBitstreamFeatures`, as libwebp 0.5 and all later ones have it."""


class _Features(ctypes.Structure):
    """`WebPBitstreamFeatures` of libwebp's decode.h."""

    _fields_ = (
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("has_alpha", ctypes.c_int),
        ("has_animation", ctypes.c_int),
        ("format", ctypes.c_int),
        ("pad", ctypes.c_uint32 * 5),
    )


def decode_webp(data: bytes, width: int, height: int) -> Image.Image | None:
    """Decode a still picture to RGB, or to RGBA if it has transparency; the same pixels as Pillow's.

    Returns None if Pillow has to decode it: it is animated, or this Pillow has no libwebp of its own. Raises
    ValueError if the data is damaged or is not a picture of `width` × `height` pixels, and MemoryError if
    there is no room for the pixels.
    """
    library = _libwebp()
    if library is None:
        return None
    features = _Features()
    if library.WebPGetFeaturesInternal(data, len(data), ctypes.byref(features), _ABI_VERSION):
        raise ValueError("the header is damaged")
    if features.has_animation:
        return None
    if (features.width, features.height) != (width, height):
        raise ValueError(f"the picture has {features.width}×{features.height} pixels, not {width}×{height}")
    pixels = np.empty((height, width, 4), np.uint8)
    if not library.WebPDecodeRGBAInto(data, len(data), pixels.ctypes.data, pixels.nbytes, 4 * width):
        raise ValueError("the data is damaged or cut short")
    image = Image.frombuffer("RGBA", (width, height), pixels, "raw", "RGBA", 0, 1)  # not a copy
    return image if features.has_alpha else image.convert("RGB")


@cache
def _libwebp() -> ctypes.CDLL | None:
    """Return the library in Pillow's wheel for Linux; None if this Pillow is of another kind."""
    for path in sorted((Path(PIL.__file__).parent.parent / "pillow.libs").glob("libwebp-*.so*")):
        try:
            library = ctypes.CDLL(str(path))
            library.WebPDecodeRGBAInto.restype = ctypes.c_void_p
            library.WebPDecodeRGBAInto.argtypes = (
                ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
            )  # fmt: skip
            library.WebPGetFeaturesInternal.argtypes = (
                ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int,
            )  # fmt: skip
        except (OSError, AttributeError):
            continue
        return library
    return None
