"""A picture file whose headers were read, before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import PIL

from inferpool.errors import BodyTooLarge

AVIF_LIBRARIES: Final = tuple(
    str(path) for path in sorted((Path(PIL.__file__).parent.parent / "pillow.libs").glob("libavif-*.so*"))
)
"""The libraries for AVIF that Pillow's wheel brings: one, or none."""
HAS_AVIF: Final = bool(AVIF_LIBRARIES)
MediaType: TypeAlias = Literal[
    "image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff", "image/avif"
]
_EVERYWHERE: Final[tuple[MediaType, ...]] = (
    "image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff",
)  # fmt: skip
MEDIA_TYPES: Final[tuple[MediaType, ...]] = (*_EVERYWHERE, "image/avif") if HAS_AVIF else _EVERYWHERE
"""The formats that are decoded."""
TAKEN: Final = (
    "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF" if HAS_AVIF else "PNG, JPEG, WebP, GIF, BMP and TIFF"
)
"""Their names, for messages."""
MAX_PARTS: Final = 65_536
"""The most chunks or segments before the pixels; libpng writes 8,192 for a PNG picture of 64 MiB."""
PILLOW_BYTES: Final = 4
"""Bytes of a pixel in a picture of Pillow with more than one channel."""


@dataclass(frozen=True, slots=True)
class Container:
    """A picture that is not decoded yet.

    Attributes:
        media_type: one of `MEDIA_TYPES`.
        width: in pixels, before `orientation` is applied.
        height: in pixels, before `orientation` is applied.
        orientation: the orientation of EXIF, from 1 (upright) to 8.
        pixels: the file without its metadata. For WebP it is the complete file, because Pillow does not read
            the metadata of WebP. For AVIF it is a file written anew.
        pixel_bytes: the most bytes of memory that a pixel takes until the picture is upright and in the mode
            of the model; a test measures them for every kind of picture.
    """

    media_type: MediaType
    width: int
    height: int
    orientation: int
    pixels: bytes
    pixel_bytes: int


def count_part(kind: str, parts: int) -> int:
    """Count one more part of a file; raises BodyTooLarge if there are too many."""
    if parts >= MAX_PARTS:
        raise BodyTooLarge(
            f"the {kind} picture has more than {MAX_PARTS} parts, the most that are taken; save it again"
        )
    return parts + 1


def copied(pixel_bytes: int, orientation: int) -> int:
    """Return the bytes of a pixel of a decoded picture, and of its copy if it is turned or mirrored."""
    return pixel_bytes if orientation == 1 else 2 * pixel_bytes
