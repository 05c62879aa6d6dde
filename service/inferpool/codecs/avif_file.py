"""Reads AVIF files without decoding them, and writes them anew with nothing but the pixels.

The decoder gets a file of the server's own making: one item of AV1, and one of its transparency. It reads no
offsets, grids, sequences or metadata of a client, and it decodes one frame of the size that was checked.

Sources: AV1 Image File Format 1.1; ISO/IEC 14496-12 (boxes) and 23008-12 (items); AV1 Bitstream 1.0,
section 5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from inferpool.codecs.image_container import PILLOW_BYTES, Container
from inferpool.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType

BRANDS: Final = (b"avif", b"avis")
_CONTAINER_BRANDS: Final = (b"mif1", b"msf1")
_FTYP_BYTES: Final = 256
"""A brand behind so many bytes does not count."""
_MOST_PARTS: Final = 1024
"""The most boxes, items and OBUs together; a file with one picture has about thirty."""
_MOST_PROPERTIES: Final = 64
"""Of a picture; further ones are not read."""
_MOST_AUXILIARIES: Final = 8
"""Pictures beside the first one, of which one may be its transparency; further ones are not read."""
_ALPHA: Final = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0"
_HEAD_BYTES: Final = 512
"""The headers of a file that is written here are shorter."""
_SEQUENCE, _FRAME_HEADER, _TILES, _FRAME = 1, 3, 4, 6
_HEADER_BYTES: Final = 16
"""As much of a sequence header as is read here."""
_KEPT: Final = frozenset((_SEQUENCE, _FRAME_HEADER, _TILES, _FRAME))
"""Types of the OBUs that make the pixels."""
_MOST_DECODED_BYTES: Final = 16
"""A pixel of three planes with 16 bits, its copy with film grain, and its copy in 8 bits."""
_CONVERTED_BYTES: Final = 1 + 2 * PILLOW_BYTES
"""RGBA, and its copy in the mode of the model."""
_REDUCED_HEADER: Final = 0x08
"""The bit of a sequence header that says that it is a short one, for a still picture."""
_ORIENTATIONS: Final = ((1, 4, 2), (8, 5, 7), (3, 2, 4), (6, 7, 5))
"""The EXIF orientation: by quarter turns to the left, then not mirrored, by the first axis, by the second."""


_Frame: TypeAlias = list[bytes | memoryview]
"""The OBUs of a picture, in pieces."""


@dataclass(slots=True)
class _Item:
    """A picture of the file: where its data are, and its properties."""

    kind: bytes = b""
    method: int = 0
    extents: list[tuple[int, int]] = field(default_factory=list)
    properties: list[int] = field(default_factory=list)


class _Reader:
    """The boxes of a file, with a bound on how many there may be."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.parts = 0

    def count(self) -> None:
        """Count one more part; raises BodyTooLarge."""
        self.parts += 1
        if self.parts > _MOST_PARTS:
            raise BodyTooLarge(f"the AVIF picture has more than {_MOST_PARTS} parts; save it again")

    def boxes(self, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """The kind, start and end of each box between two places."""
        while at + 8 <= end:
            self.count()
            size, kind = struct.unpack_from(">I4s", self.body, at)
            start = at + 8
            if size == 1:
                (size,) = struct.unpack_from(">Q", self.body, start)
                start += 8
            stop = end if size == 0 else at + size
            if not start <= stop <= end:
                raise MalformedBody(f"the AVIF picture is damaged or cut short at byte {at}")
            yield kind, start, stop
            at = stop

    def number(self, at: int, size: int) -> int:
        """The number in `size` bytes at `at`."""
        if at + size > len(self.body):
            raise MalformedBody("the picture ends in the middle of its headers")
        return int.from_bytes(self.body[at : at + size], "big")


def is_avif(body: bytes) -> bool:
    """Return whether a file says that it is AVIF: by its brand, or as a container by one of its brands."""
    if body[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(body[:4], "big"), _FTYP_BYTES)
    brands = [body[at : at + 4] for at in range(16, end - 3, 4)]
    return body[8:12] in BRANDS or (body[8:12] in _CONTAINER_BRANDS and b"avif" in brands)


def open_avif(body: bytes) -> Container:
    """Read an AVIF file, and write its first picture anew.

    Raises MalformedBody, BodyTooLarge for too many parts, struct.error, and UnsupportedMediaType for pictures
    of several tiles or layers, whose cost does not follow from their size.
    """
    reader = _Reader(body)
    meta = next(((a, b) for kind, a, b in reader.boxes(0, len(body)) if kind == b"meta"), None)
    if meta is None:
        raise MalformedBody("the AVIF picture has no picture item in its headers")
    boxes = {kind: (start, stop) for kind, start, stop in reader.boxes(meta[0] + 4, meta[1])}
    for kind in (b"pitm", b"iinf", b"iloc", b"iprp"):
        if kind not in boxes:
            raise MalformedBody(f"the AVIF picture has no {kind.decode()} in its headers")
    at = boxes[b"pitm"][0]
    primary = reader.number(at + 4, 4 if reader.number(at, 1) else 2)
    references = _references(reader, *boxes[b"iref"]) if b"iref" in boxes else []
    auxiliary = [source for kind, source, target in references if kind == b"auxl" and target == primary]
    auxiliary = auxiliary[:_MOST_AUXILIARIES]
    items = {identity: _Item() for identity in (primary, *auxiliary)}
    _read_kinds(reader, *boxes[b"iinf"], items)
    _read_places(reader, *boxes[b"iloc"], items)
    properties = _read_properties(reader, *boxes[b"iprp"], items)
    data = boxes.get(b"idat", (0, 0))
    colour = items[primary]
    if colour.kind != b"av01":
        raise UnsupportedMediaType("the AVIF picture is made of several tiles; save it as one, or as PNG")

    def found(item: _Item, kind: bytes) -> bytes | None:
        return next(
            (body[a:b] for k, a, b in (properties[i] for i in item.properties) if k == kind),
            None,
        )

    ispe, av1c = found(colour, b"ispe"), found(colour, b"av1C")
    if ispe is None or av1c is None:
        raise MalformedBody("the AVIF picture has no size in its headers")
    width, height = struct.unpack_from(">II", ispe, 4)
    frame, decoded_bytes = _frame(reader, colour, data)
    parts = [(av1c[:4], frame, found(colour, b"colr"))]
    pixel_bytes = _CONVERTED_BYTES + decoded_bytes
    premultiplied = False
    for identity in auxiliary:
        item = items[identity]
        auxc, av1c = found(item, b"auxC"), found(item, b"av1C")
        if item.kind == b"av01" and av1c is not None and auxc is not None and auxc[4:].startswith(_ALPHA):
            frame, decoded_bytes = _frame(reader, item, data)
            parts.append((av1c[:4], frame, None))
            pixel_bytes += decoded_bytes
            premultiplied = (b"prem", primary, identity) in references
            break
    turn, mirror = found(colour, b"irot") or b"\0", found(colour, b"imir")
    orientation = _ORIENTATIONS[turn[0] & 3][1 + (mirror[0] & 1) if mirror else 0]
    return Container(
        "image/avif",
        width,
        height,
        orientation,
        _write(width, height, parts, premultiplied=premultiplied),
        pixel_bytes,
    )


def has_alpha(file: bytes) -> bool:
    """Return whether a file that `open_avif` has written has transparency."""
    return b"auxC" in file[:_HEAD_BYTES]


def _references(reader: _Reader, start: int, end: int) -> list[tuple[bytes, int, int]]:
    """The kind, source and target of each reference between items."""
    size = 4 if reader.number(start, 1) else 2
    found = []
    for kind, at, stop in reader.boxes(start + 4, end):
        source, count = reader.number(at, size), reader.number(at + size, 2)
        for target in range(at + size + 2, min(stop, at + size + 2 + size * count), size):
            reader.count()
            found.append((kind, source, reader.number(target, size)))
    return found


def _read_kinds(reader: _Reader, start: int, end: int, items: dict[int, _Item]) -> None:
    for kind, at, _ in reader.boxes(start + (8 if reader.number(start, 1) else 6), end):
        size = 4 if reader.number(at, 1) == 3 else 2
        identity = reader.number(at + 4, size)
        if kind == b"infe" and identity in items:
            items[identity].kind = reader.body[at + 6 + size : at + 10 + size]


def _read_places(reader: _Reader, at: int, end: int, items: dict[int, _Item]) -> None:
    version, sizes = reader.number(at, 1), reader.number(at + 4, 2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    identity_size = 4 if version == 2 else 2
    count = reader.number(at + 6, identity_size)
    at += 6 + identity_size
    for _ in range(count):
        reader.count()
        identity, method = reader.number(at, identity_size), 0
        at += identity_size
        if version:
            method = reader.number(at, 2) & 15
            at += 2
        elsewhere, base = reader.number(at, 2), reader.number(at + 2, base_size)
        extents = reader.number(at + 2 + base_size, 2)
        at += 4 + base_size
        item = items.get(identity)
        if item is not None:
            # Data in another file cannot be reached.
            item.method, item.extents = 2 if elsewhere else method, []
        for _ in range(extents):
            reader.count()
            at += index_size if version else 0
            offset, length = reader.number(at, offset_size), reader.number(at + offset_size, length_size)
            at += offset_size + length_size
            if item is not None:
                item.extents.append((base + offset, length))


def _read_properties(
    reader: _Reader, start: int, end: int, items: dict[int, _Item]
) -> list[tuple[bytes, int, int]]:
    """Return the kind, start and end of each property, and give the items the numbers of theirs, from 0."""
    properties: list[tuple[bytes, int, int]] = []
    for kind, at, stop in reader.boxes(start, end):
        if kind == b"ipco":
            properties = list(reader.boxes(at, stop))
        elif kind == b"ipma":
            wide, identity_size = reader.number(at + 3, 1) & 1, 4 if reader.number(at, 1) else 2
            count = reader.number(at + 4, 4)
            at += 8
            for _ in range(count):
                reader.count()
                item = items.get(reader.number(at, identity_size))
                numbers = reader.number(at + identity_size, 1)
                at += identity_size + 1
                if item is not None:
                    item.properties += [
                        reader.number(at + i * (1 + wide), 1 + wide) & (0x7FFF if wide else 0x7F)
                        for i in range(min(numbers, _MOST_PROPERTIES - len(item.properties)))
                    ]
                at += numbers * (1 + wide)
    for item in items.values():
        # A property of number 0 is none.
        item.properties = [number - 1 for number in item.properties if 0 < number <= len(properties)]
    return properties


def _frame(reader: _Reader, item: _Item, data: tuple[int, int]) -> tuple[_Frame, int]:
    """Return the OBUs that make the pixels of an item: one frame; and the bytes that a pixel takes."""
    body, whole = reader.body, data if item.method == 1 else (0, len(reader.body))
    if item.method > 1 or not item.extents:
        raise MalformedBody("the AVIF picture has no pixels of its own")
    view, pieces, size = memoryview(body), [], 0
    for offset, length in item.extents:
        start = whole[0] + offset
        stop = start + length if length else whole[1]
        size += stop - start
        if not whole[0] <= start <= stop <= whole[1] or size > len(body):
            raise MalformedBody("the AVIF picture is damaged or cut short: its pixels are outside the file")
        pieces.append(view[start:stop])
    found = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
    kept: _Frame = []
    kinds, at, decoded_bytes = [], 0, _MOST_DECODED_BYTES
    while at < len(found):
        reader.count()
        header, start = found[at], at + 1 + (found[at] >> 2 & 1)
        length = len(found) - start
        if header & 2:
            length, start = _leb128(found, start)
        kind, stop = header >> 3 & 15, start + length
        if header & 0x80 or not start <= stop <= len(found):
            raise MalformedBody("the AVIF picture is damaged or cut short")
        if kind in _KEPT:
            kinds.append(kind)
            if kind == _SEQUENCE:
                decoded_bytes = _decoded_bytes(bytes(found[start : start + _HEADER_BYTES]))
            # Without its extension, which only layers need, and with its size.
            kept += [bytes((kind << 3 | 2,)), _as_leb128(length), found[start:stop]]
        at = stop
    if kinds.count(_FRAME) + kinds.count(_FRAME_HEADER) != 1 or kinds.count(_SEQUENCE) != 1:
        raise UnsupportedMediaType("the AVIF picture has layers; save it without, or as PNG")
    return kept, decoded_bytes


def _decoded_bytes(header: bytes) -> int:
    """Return the bytes of a decoded pixel and of its copies, as a sequence header has them at most."""
    bits = int.from_bytes(header.ljust(_HEADER_BYTES, b"\0"), "big")

    def read(at: int, size: int) -> int:
        return bits >> 128 - at - size & (1 << size) - 1

    if not header or not header[0] & _REDUCED_HEADER:
        return _MOST_DECODED_BYTES
    profile = read(0, 3)
    # Behind the level: the lengths of width and height, less 1, both of them, and six switches.
    at = 18 + read(10, 4) + 1 + read(14, 4) + 1 + 6
    deep = read(at, 1)
    at += 2 if profile == 2 and deep else 1
    planes = 1 if profile != 1 and read(at, 1) else 3
    return 2 * planes * (1 + deep) + deep * (1 + planes)


def _leb128(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number at `at`, and where it ends."""
    value = 0
    for index, byte in enumerate(data[at : at + 8]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise MalformedBody("the AVIF picture is damaged or cut short")


def _as_leb128(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _write(
    width: int, height: int, parts: Sequence[tuple[bytes, _Frame, bytes | None]], *, premultiplied: bool
) -> bytes:
    """Return an AVIF file of one picture: the configuration, frame and colours of it, and of its alpha."""
    empty = bytes(4)
    properties = [_box(b"ispe", empty, struct.pack(">II", width, height))]
    associations, infos = [], []
    for number, (configuration, _, colours) in enumerate(parts, 1):
        own = [_box(b"av1C", configuration)]
        if number > 1:
            own.append(_box(b"auxC", empty, _ALPHA))
        # The kind nclx says how the colours are stored. Profiles are left out, as Pillow does not apply them.
        if colours is not None and colours[:4] == b"nclx":
            own.append(_box(b"colr", colours[:11]))
        numbers = [1, *range(len(properties) + 1, len(properties) + 1 + len(own))]
        properties += own
        associations.append(struct.pack(">HB", number, len(numbers)) + bytes(numbers))
        infos.append(_box(b"infe", b"\2\0\0\0", struct.pack(">HH4sB", number, 0, b"av01", 0)))
    count = struct.pack(">H", len(parts))
    head = [
        _box(b"hdlr", empty, empty, b"pict", bytes(13)),
        _box(b"pitm", empty, b"\0\1"),
        _box(b"iinf", empty, count, *infos),
        _box(
            b"iprp",
            _box(b"ipco", *properties),
            _box(b"ipma", empty, struct.pack(">I", len(parts)), *associations),
        ),
    ]
    if len(parts) > 1:
        alpha = [_box(b"auxl", struct.pack(">HHH", 2, 1, 1))]
        if premultiplied:
            alpha.append(_box(b"prem", struct.pack(">HHH", 1, 1, 2)))
        head.append(_box(b"iref", empty, *alpha))
    ftyp = _box(b"ftyp", b"avif", empty, b"avif", b"mif1")
    places_bytes = 8 + 4 + 4 + 14 * len(parts)
    at = len(ftyp) + 12 + sum(map(len, head)) + places_bytes + 8
    places = []
    for number, (_, frame, _) in enumerate(parts, 1):
        size = sum(map(len, frame))
        places.append(struct.pack(">HHHII", number, 0, 1, at, size))
        at += size
    iloc = _box(b"iloc", empty, b"\x44\0", count, *places)
    meta = _box(b"meta", empty, *head, iloc)
    mdat = struct.pack(">I4s", 8 + at - len(ftyp) - len(meta) - 8, b"mdat")
    return b"".join((ftyp, meta, mdat, *(piece for _, frame, _ in parts for piece in frame)))
