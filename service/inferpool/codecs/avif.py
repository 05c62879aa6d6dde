"""Decodes AVIF pictures in one thread and in bounded memory.

Pillow's plugin lets a frame have 268 million pixels whatever the file says, decodes in as many threads as
there are cores, and copies all pixels twice while it holds the GIL. So the libavif that Pillow's wheels bring
from 11.3 on is called directly, by the functions and the first fields in its `avif.h` that all versions of
libavif 1 have.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Final

import numpy as np
from PIL import Image

from inferpool.codecs.avif_file import has_alpha
from inferpool.codecs.image_container import AVIF_LIBRARIES

_DAV1D: Final = 2
_RGBA: Final = 1
_OUT_OF_MEMORY: Final = 26
_SIZE_LIMIT, _SIDE_LIMIT, _STRICT = 16384 * 16384, 32768, 7
"""The values of a new decoder. A library that shows others has other fields, too."""
_MOST_SIDE: Final = 65536
"""AV1 has no larger pictures."""


class _Decoder(ctypes.Structure):
    """The beginning of `avifDecoder`."""

    _fields_ = (
        ("codec_choice", ctypes.c_int),
        ("max_threads", ctypes.c_int),
        ("requested_source", ctypes.c_int),
        ("allow_progressive", ctypes.c_int),
        ("allow_incremental", ctypes.c_int),
        ("ignore_exif", ctypes.c_int),
        ("ignore_xmp", ctypes.c_int),
        ("image_size_limit", ctypes.c_uint32),
        ("image_dimension_limit", ctypes.c_uint32),
        ("image_count_limit", ctypes.c_uint32),
        ("strict_flags", ctypes.c_uint32),
        ("image", ctypes.POINTER(ctypes.c_uint32)),
    )


class _RgbImage(ctypes.Structure):
    """`avifRGBImage`, with room for fields that are added."""

    _fields_ = (
        ("width", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
        ("depth", ctypes.c_uint32),
        ("format", ctypes.c_int),
        ("chroma_upsampling", ctypes.c_int),
        ("chroma_downsampling", ctypes.c_int),
        ("avoid_libyuv", ctypes.c_int),
        ("ignore_alpha", ctypes.c_int),
        ("alpha_premultiplied", ctypes.c_int),
        ("is_float", ctypes.c_int),
        ("max_threads", ctypes.c_int),
        ("pixels", ctypes.c_void_p),
        ("row_bytes", ctypes.c_uint32),
        ("more", ctypes.c_uint32 * 16),
    )


def decode_avif(data: bytes, width: int, height: int) -> Image.Image:
    """Decode a file of `open_avif` to RGB, or to RGBA if it has transparency; the same pixels as Pillow's.

    Raises ValueError if the data is damaged or is not a picture of `width` × `height` pixels, and MemoryError
    if there is no room for the pixels.
    """
    library = _libavif()
    if library is None:
        raise ValueError("there is no library for AVIF")
    if width > _MOST_SIDE or height > _MOST_SIDE:
        raise ValueError(f"AV1 has no pictures of {width}×{height} pixels")
    decoder = library.avifDecoderCreate()
    if not decoder:
        raise MemoryError
    try:
        fields = decoder.contents
        fields.codec_choice, fields.max_threads, fields.strict_flags = _DAV1D, 1, 0
        fields.ignore_exif = fields.ignore_xmp = 1
        # dav1d refuses a larger frame before it has memory for it.
        fields.image_size_limit, fields.image_dimension_limit = min(width * height, 2**28), _MOST_SIDE
        _check(library.avifDecoderSetIOMemory(decoder, data, len(data)))
        _check(library.avifDecoderParse(decoder))
        _check(library.avifDecoderNextImage(decoder))
        if (fields.image[0], fields.image[1]) != (width, height):
            raise ValueError(f"the decoder finds {fields.image[0]}×{fields.image[1]} pixels")
        pixels = np.empty((height, width, 4), np.uint8)
        rgb = _RgbImage()
        library.avifRGBImageSetDefaults(ctypes.byref(rgb), fields.image)
        rgb.depth, rgb.format = 8, _RGBA
        rgb.pixels, rgb.row_bytes = pixels.ctypes.data, 4 * width
        _check(library.avifImageYUVToRGB(fields.image, ctypes.byref(rgb)))
    finally:
        library.avifDecoderDestroy(decoder)
    image = Image.frombuffer("RGBA", (width, height), pixels, "raw", "RGBA", 0, 1)  # not a copy
    return image if has_alpha(data) else image.convert("RGB")


def _check(result: int) -> None:
    if result == _OUT_OF_MEMORY:
        raise MemoryError
    if result:
        raise ValueError("the data is damaged or cut short")


@cache
def _libavif() -> ctypes.CDLL | None:
    """Return the library in Pillow's wheel for Linux; None if its fields are not those of libavif 1."""
    for path in AVIF_LIBRARIES:
        try:
            library = ctypes.CDLL(str(path))
            made = ctypes.POINTER(_Decoder)
            pointer = ctypes.POINTER(ctypes.c_uint32)
            library.avifVersion.restype = ctypes.c_char_p
            library.avifDecoderCreate.restype = made
            library.avifDecoderDestroy.argtypes = (made,)
            library.avifDecoderSetIOMemory.argtypes = (made, ctypes.c_char_p, ctypes.c_size_t)
            library.avifDecoderParse.argtypes = library.avifDecoderNextImage.argtypes = (made,)
            library.avifRGBImageSetDefaults.argtypes = (ctypes.c_void_p, pointer)
            library.avifImageYUVToRGB.argtypes = (pointer, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
        decoder = library.avifDecoderCreate()
        fields = decoder.contents
        limits = (fields.image_size_limit, fields.image_dimension_limit, fields.strict_flags)
        library.avifDecoderDestroy(decoder)
        if library.avifVersion().startswith(b"1.") and limits == (_SIZE_LIMIT, _SIDE_LIMIT, _STRICT):
            return library
    return None
