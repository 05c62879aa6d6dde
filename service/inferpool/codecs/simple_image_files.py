"""Reads BMP and GIF files without decoding them.

Sources: BITMAPINFOHEADER and its successors (Microsoft, Windows GDI); GIF89a (CompuServe, 1990).
"""

from __future__ import annotations

import struct
from typing import Final

from inferpool.codecs.image_container import PILLOW_BYTES, Container, count_part
from inferpool.errors import MalformedBody, UnsupportedMediaType

BMP_SIGNATURE: Final = b"BM"
GIF_SIGNATURES: Final = (b"GIF87a", b"GIF89a")

_OLD_HEADER: Final = 12
_UNCOMPRESSED: Final = (0, 3)
"""BI_RGB and BI_BITFIELDS. Pillow decodes run lengths in Python, which takes seconds for a large picture."""
_PIXEL_BYTES: Final = 1 + 2 * PILLOW_BYTES
"""A decoded pixel of a palette or of colours, and its copy in the mode of the model."""
_EXTENSION: Final = 0x21
_CONTROL: Final = 0xF9
_IMAGE: Final = 0x2C
_HAS_COLOURS: Final = 0x80


def open_bmp(body: bytes) -> Container:
    """Read a BMP file; raises MalformedBody, UnsupportedMediaType for run lengths, and struct.error."""
    (header,) = struct.unpack_from("<I", body, 14)
    if header == _OLD_HEADER:
        width, height = struct.unpack_from("<HH", body, 18)
    else:
        width, height, _, _, compression = struct.unpack_from("<iiHHI", body, 18)
        if compression not in _UNCOMPRESSED:
            raise UnsupportedMediaType(
                "the BMP picture is compressed; save it without compression, or as PNG"
            )
    # A negative height means that the first row is the upper one.
    return Container("image/bmp", abs(width), abs(height), 1, body, _PIXEL_BYTES)


def open_gif(body: bytes) -> Container:
    """Read a GIF file and keep its first frame; raises MalformedBody, BodyTooLarge and struct.error."""
    width, height, flags = struct.unpack_from("<HHB", body, 6)
    at = 13 + _colours_bytes(flags)
    kept = [body[:at]]
    control = b""
    parts = 0
    while True:
        parts = count_part("GIF", parts)
        kind, label = struct.unpack_from("<BB", body, at)
        if kind == _IMAGE:
            break
        if kind != _EXTENSION:
            raise MalformedBody("the GIF picture has no frame")
        start, at = at, at + 2
        while length := struct.unpack_from("<B", body, at)[0]:
            parts = count_part("GIF", parts)
            at += 1 + length
        at += 1
        if label == _CONTROL:
            control = body[start:at]
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", body, at + 1)
    if left + frame_width > width or top + frame_height > height:
        raise MalformedBody(
            f"the first frame of the GIF picture does not lie within its {width}×{height} pixels"
        )
    return Container("image/gif", width, height, 1, b"".join((*kept, control, body[at:])), _PIXEL_BYTES)


def _colours_bytes(flags: int) -> int:
    """Return the size of a table of colours, which `flags` describe."""
    return 3 * (2 << (flags & 7)) if flags & _HAS_COLOURS else 0
