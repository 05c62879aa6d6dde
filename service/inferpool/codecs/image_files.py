"""Reads picture files without decoding them: format, size, orientation, and the pixels without metadata.

Pillow gets only the bytes that it needs to decode the first frame. Its parsers of text, profiles, EXIF and
animation warn, decompress again or trust offsets, so these parts are removed. The only important one, the
orientation, is a single tag, which is read here. Nothing is decoded here, so a picture can be refused by
its size first.

Sources: PNG, W3C Recommendation (third edition), section 5; JPEG, ITU-T T.81, annex B; WebP, RFC 9649,
section 2; Exif 3.0 (CIPA DC-008), section 4.6, which uses the structure of TIFF 6.0.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from inferpool.codecs.avif_file import is_avif, open_avif
from inferpool.codecs.image_container import (
    HAS_AVIF,
    MEDIA_TYPES,
    PILLOW_BYTES,
    TAKEN,
    Container,
    copied,
    count_part,
)
from inferpool.codecs.simple_image_files import BMP_SIGNATURE, GIF_SIGNATURES, open_bmp, open_gif
from inferpool.codecs.tiff_file import TIFF_SIGNATURES, open_tiff
from inferpool.errors import BodyTooLarge, MalformedBody, RequestError, UnsupportedMediaType

OTHER_FORMATS: Final = (
    (0, b"\0\0\1\0", "ICO"),
    (0, b"%PDF-", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"P6\n", "PPM"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n", "JPEG XL"),
    (4, b"jP  \r\n", "JPEG 2000"),
    *(() if HAS_AVIF else ((4, b"ftypavif", "AVIF"),)),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
)
"""Signatures of other picture formats: offset, bytes, and the name of the format."""

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE: Final = b"\xff\xd8\xff"
EXIF_PREFIX: Final = b"Exif\0\0"

PNG_PIXEL_CHUNKS: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
PNG_RGB: Final = 2
PNG_DEEP: Final = 16

SOF: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
SOS: Final = 0xDA
APP1: Final = 0xE1
JPEG_METADATA: Final = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""APP1 to APP15 and comments, except APP14, which says how the colours are stored. APP0 is JFIF's."""
MAX_SCANS: Final = 100
"""A progressive JPEG needs about ten. Even a short scan makes the decoder pass over the whole picture."""
JPEG_BARE_MARKERS: Final = frozenset({0x01, *range(0xD0, 0xD8)})
"""The markers that are not followed by a length."""

DEEP_PNG_PIXEL_BYTES: Final = 14
"""For PNG pictures of 16 bits a channel, which are converted step by step."""
WEBP_PIXEL_BYTES: Final = 17
"""The decoder keeps two pictures beside its own buffers, and Pillow copies one of them twice."""
ORIENTATION: Final = 0x0112
INTEGER_FORMATS: Final = {3: "H", 4: "I"}


def open_container(body: bytes) -> Container:
    """Read the headers of a picture file.

    Raises UnsupportedMediaType for a known format that is not taken. Raises MalformedBody for
    other bytes, for headers that are damaged or cut short, and for a width or height of 0. Raises
    BodyTooLarge for a JPEG with more than `MAX_SCANS` scans, and for more than `MAX_PARTS` parts.
    """
    try:
        if body.startswith(PNG_SIGNATURE):
            container = _open_png(body)
        elif body.startswith(JPEG_SIGNATURE):
            container = _open_jpeg(body)
        elif body.startswith(b"RIFF") and body[8:12] == b"WEBP":
            container = _open_webp(body)
        elif body.startswith(GIF_SIGNATURES):
            container = open_gif(body)
        elif body.startswith(BMP_SIGNATURE):
            container = open_bmp(body)
        elif body.startswith(TIFF_SIGNATURES):
            container = open_tiff(body, read_orientation(body))
        elif HAS_AVIF and is_avif(body):
            container = open_avif(body)
        else:
            raise _no_container(body)
    except struct.error:
        raise MalformedBody("the picture ends in the middle of its headers") from None
    if container.width == 0 or container.height == 0:
        raise MalformedBody(f"the picture's size is {container.width}×{container.height}")
    return container


def _no_container(body: bytes) -> RequestError:
    for start, signature, name in OTHER_FORMATS:
        if body.startswith(signature, start):
            return UnsupportedMediaType(
                f"the picture is {name}; {TAKEN} are taken", expected=list(MEDIA_TYPES)
            )
    return MalformedBody(f"the body is not a picture: it does not start like {TAKEN}")


def _open_png(body: bytes) -> Container:
    first, width, height, depth, colour = struct.unpack_from(">4sIIBB", body, len(PNG_SIGNATURE) + 4)
    if first != b"IHDR":
        raise MalformedBody("the PNG picture does not start with its header chunk")
    view, kept, exif = memoryview(body), [memoryview(PNG_SIGNATURE)], b""
    at, parts, transparent = len(PNG_SIGNATURE), 0, False
    # A chunk that is cut short is kept: the decoder notices that pixels are missing.
    while at + 8 <= len(body):
        parts = count_part("PNG", parts)
        length, kind = struct.unpack_from(">I4s", body, at)
        transparent = transparent or kind == b"tRNS"
        if kind == b"eXIf":
            exif = body[at + 8 : at + 8 + length]
        elif kind == b"tRNS" and (depth, colour) == (16, PNG_RGB):
            kept.append(memoryview(_transparent_colour_in_8_bits(body[at + 8 : at + 8 + length])))
        elif kind in PNG_PIXEL_CHUNKS:
            kept.append(view[at : at + 12 + length])
        if kind == b"IEND":
            break
        at += 12 + length
    orientation = read_orientation(exif)
    plain = (depth, colour) == (8, PNG_RGB) and not transparent
    converted = DEEP_PNG_PIXEL_BYTES if depth == PNG_DEEP else 2 * PILLOW_BYTES
    pixel_bytes = 1 + (copied(PILLOW_BYTES, orientation) if plain else converted)
    return Container("image/png", width, height, orientation, b"".join(kept), pixel_bytes)


def _transparent_colour_in_8_bits(colour: bytes) -> bytes:
    """Return a tRNS chunk with the high bytes of the red, green and blue of `colour`.

    Pillow keeps the high bytes of 16-bit colours, but would compare them with all 16 bits of the
    transparent one.
    """
    red, green, blue = (value >> 8 for value in struct.unpack_from(">HHH", colour))
    chunk = struct.pack(">4sHHH", b"tRNS", red, green, blue)
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _open_jpeg(body: bytes) -> Container:
    view, kept, exif = memoryview(body), [memoryview(body[:2])], b""
    size: tuple[int, int] | None = None
    at, parts, progressive, channels = 2, 0, False, 0
    while True:
        parts = count_part("JPEG", parts)
        filler, marker = struct.unpack_from(">BB", body, at)
        if filler != 0xFF:
            raise MalformedBody(f"the JPEG picture has no marker at byte {at}, but needs one there")
        if marker == 0xFF:
            at += 1
            continue
        if marker == SOS:
            break
        if marker in JPEG_BARE_MARKERS:
            at += 2
            continue
        (length,) = struct.unpack_from(">H", body, at + 2)
        end = at + 2 + length
        if marker in SOF:
            height, width, channels = struct.unpack_from(">HHB", body, at + 5)
            size, progressive = (width, height), marker in PROGRESSIVE
        if marker == APP1 and body.startswith(EXIF_PREFIX, at + 4):
            exif = exif or body[at + 4 : end]
        if marker not in JPEG_METADATA:
            kept.append(view[at:end])
        at = end
    if size is None:
        raise MalformedBody("the JPEG picture has no size in its headers")
    scans = body.count(b"\xff\xda", at)
    if scans > MAX_SCANS:
        raise BodyTooLarge(f"the JPEG picture has {scans} scans; at most {MAX_SCANS} are taken")
    kept.append(view[at:])
    orientation = read_orientation(exif)
    # If there are several scans, the decoder keeps two bytes for each channel until the last of them.
    decoder = 2 * channels if progressive or scans > 1 else 0
    decoded = 1 if channels == 1 else PILLOW_BYTES
    converted = decoded if channels == 3 else decoded + PILLOW_BYTES
    pixel_bytes = 1 + max(decoded + decoder, converted, copied(decoded, orientation))
    return Container("image/jpeg", *size, orientation, b"".join(kept), pixel_bytes)


def _open_webp(body: bytes) -> Container:
    kind = body[12:16]
    exif = b""
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", body, 24)
        width, height = (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
        exif = _find_webp_exif(body)
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", body, 26))
    else:
        raise MalformedBody("the WebP picture does not start with VP8, VP8L or VP8X")
    return Container("image/webp", width, height, read_orientation(exif), body, WEBP_PIXEL_BYTES)


def _find_webp_exif(body: bytes) -> bytes:
    at, parts = 12, 0
    while at + 8 <= len(body):
        parts = count_part("WebP", parts)
        kind, length = struct.unpack_from("<4sI", body, at)
        if kind == b"EXIF":
            return body[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return b""


def read_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, in a block of EXIF; 1 if there is none or it is invalid."""
    tiff = exif.removeprefix(EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        magic, at = struct.unpack_from(order + "HI", tiff, 2)
        if magic != 42:
            return 1
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, datatype, _ = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == ORIENTATION and datatype in INTEGER_FORMATS:
                (value,) = struct.unpack_from(order + INTEGER_FORMATS[datatype], tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        # Damaged EXIF is no reason to refuse a picture.
        return 1
    return 1
