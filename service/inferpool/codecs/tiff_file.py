"""Reads TIFF files without decoding them: the first picture, with the tags that its pixels need.

Pillow reads every tag of a directory, wherever it points and however long it is, so the decoder gets a
directory of its own, behind the file, with checked tags. Pictures with JPEG inside are refused: the memory
that decoding them takes does not follow from their size.

Source: TIFF 6.0 (Adobe, 1992).
"""

from __future__ import annotations

import ctypes
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import PIL

from inferpool.codecs.image_container import MAX_PARTS, PILLOW_BYTES, Container
from inferpool.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType

TIFF_SIGNATURES: Final = (b"II*\0", b"MM\0*")

_WIDTH: Final = 256
_HEIGHT: Final = 257
_BITS: Final = 258
_COMPRESSION: Final = 259
_SAMPLES: Final = 277
_SAMPLE_FORMAT: Final = 339
_TILE_WIDTH: Final = 322
_TILE_HEIGHT: Final = 323
_STRIPS: Final = frozenset((273, 279, 324, 325))
"""Where strips and tiles are, and how long they are."""
_KEPT: Final = _STRIPS | {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _SAMPLE_FORMAT, _TILE_WIDTH, _TILE_HEIGHT),
    *(
        262,
        266,
        278,
        284,
        292,
        293,
        317,
        320,
        338,
    ),  # colours, order of bits and samples, rows of a strip, fax
}
_TYPE_BYTES: Final = {1: 1, 3: 2, 4: 4}
"""The types of whole numbers: BYTE, SHORT, LONG."""
_FORMATS: Final = {1: "B", 3: "H", 4: "I"}
_MOST_VALUES: Final = 3 * 2**16
"""The table of colours has as many for 16 bits."""
_COMPRESSIONS: Final = frozenset((1, 2, 3, 4, 5, 8, 32773, 32946))
"""None, three kinds of fax, LZW, Deflate, PackBits, and Deflate under its old number."""
_TILE_PIXELS: Final = 2**18
"""A tile may have as many pixels even if the picture has fewer."""
_PIXEL_BYTES: Final = 1 + 4 * PILLOW_BYTES
"""A strip of 16 bits a sample may be the whole picture; beside it are the decoded one and its copy."""


class _Tag(NamedTuple):
    """A tag: its entry in the directory, and the first of its values."""

    entry: bytes
    value: int


def open_tiff(body: bytes, orientation: int) -> Container:
    """Read a TIFF file, whose orientation is known.

    Raises MalformedBody, BodyTooLarge, UnsupportedMediaType for pixels that are not decoded, and
    struct.error.
    """
    order = "<" if body[:2] == b"II" else ">"
    tags = _read_tags(body, order)
    width, height = _value(tags, _WIDTH, 0), _value(tags, _HEIGHT, 0)
    compression, bits, samples = (
        _value(tags, _COMPRESSION, 1),
        _value(tags, _BITS, 1),
        _value(tags, _SAMPLES, 1),
    )
    if compression not in _COMPRESSIONS:
        raise UnsupportedMediaType(
            f"the TIFF picture has compression {compression}; save it with LZW, with Deflate or without"
        )
    if bits not in (1, 2, 4, 8, 16) or samples not in range(1, 6) or _value(tags, _SAMPLE_FORMAT, 1) != 1:
        raise UnsupportedMediaType(
            "the TIFF picture has pixels other than 1 to 16 bits a sample; save it as PNG"
        )
    tile = _value(tags, _TILE_WIDTH, 0) * _value(tags, _TILE_HEIGHT, 0)
    if tile > max(width * height, _TILE_PIXELS):
        raise BodyTooLarge(f"a tile of the TIFF picture has {tile} pixels, more than the picture")
    directory = [struct.pack(f"{order}H", len(tags)), *(tags[name].entry for name in sorted(tags)), b"\0" * 4]
    start = len(body) + len(body) % 2
    head = body[:4] + struct.pack(f"{order}I", start)
    pixels = b"".join((head, body[8:], b"\0" * (len(body) % 2), *directory))
    # The decoder reads strips into memory of its own, before it unpacks them.
    copied = len(pixels) // max(1, width * height) + 1
    return Container("image/tiff", width, height, orientation, pixels, _PIXEL_BYTES + copied)


def _read_tags(body: bytes, order: str) -> dict[int, _Tag]:
    """Return the tags of the first directory that are kept, each within the file."""
    (at,) = struct.unpack_from(f"{order}I", body, 4)
    (count,) = struct.unpack_from(f"{order}H", body, at)
    tags: dict[int, _Tag] = {}
    for start in range(at + 2, at + 2 + 12 * count, 12):
        name, kind, values = struct.unpack_from(f"{order}HHI", body, start)
        if name not in _KEPT or name in tags:
            continue
        if kind not in _TYPE_BYTES:
            raise MalformedBody(f"tag {name} of the TIFF picture is no whole number")
        if not 1 <= values <= (MAX_PARTS if name in _STRIPS else _MOST_VALUES):
            raise BodyTooLarge(f"tag {name} of the TIFF picture has {values} values, too many")
        size = values * _TYPE_BYTES[kind]
        values_at = start + 8
        if size > 4:
            (values_at,) = struct.unpack_from(f"{order}I", body, start + 8)
        if values_at + size > len(body):
            raise MalformedBody(f"tag {name} of the TIFF picture lies outside the file")
        (value,) = struct.unpack_from(order + _FORMATS[kind], body, values_at)
        tags[name] = _Tag(body[start : start + 12], value)
    return tags


def _value(tags: dict[int, _Tag], name: int, default: int) -> int:
    tag = tags.get(name)
    return default if tag is None else tag.value


@cache
def silence_libtiff() -> None:
    """Let libtiff, which Pillow calls, write nothing: it would report faults of clients to the log."""
    # The symbol is found in the library that Pillow's own module is linked to, wherever that lies.
    with suppress(OSError, AttributeError, StopIteration):
        library = ctypes.CDLL(str(next(Path(PIL.__file__).parent.glob("_imaging.*so"))))
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            setter = getattr(library, name)
            setter.argtypes, setter.restype = (ctypes.c_void_p,), ctypes.c_void_p
            setter(None)
