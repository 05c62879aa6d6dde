"""Content-Encoding: decompresses request bodies within their limit and compresses responses on request."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Final

from inferpool.allowance import Allowance
from inferpool.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType
from inferpool.http.predict.api import Data
from inferpool.wire.large_bytes import pieces

_CODINGS: Final = ("gzip", "x-gzip", "deflate")
_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS

_FREE_EXPANSION_BYTES: Final = 1024 * 1024
_MOST_EXPANSION: Final = 100
"""A body may decompress to 1 MiB or to this many times its size; more is an attack."""
_PIECE_BYTES: Final = 256 * 1024
_STEP_BYTES: Final = 512 * 1024
"""Memory for the output is reserved by so much at a time."""
_GZIP: Final = 16 + zlib.MAX_WBITS
_GZIP_STARTS_WITH: Final = 0x1F
_MOST_MEMBERS: Final = 4096
"""Each member costs a copy of the piece of input that follows it, so that short ones would cost much."""
_FASTEST: Final = 1
_TRIED_BYTES: Final = 16 * 1024
"""Bytes at the start of a response that are compressed to estimate whether the rest shrinks."""
_WORTHWHILE_SHARE: Final = 0.8
"""The largest share that is worth the time. Random binary numbers shrink by about 8 % only, and compressing
them takes 20 times as long as sending them."""


def decompress(data: Data, encoding: str, allowance: Allowance) -> Data:
    """Decompress a body whose Content-Encoding is gzip, deflate or none.

    `identity` in the list is ignored: senders should leave it out (RFC 9110, 8.4.1), but it changes nothing.
    Raises BodyTooLarge as soon as the output exceeds `allowance.most_bytes`, UnsupportedMediaType for other
    encodings, MalformedBody for data that is damaged or cut off, and what `Allowance.take` raises.
    """
    if encoding not in _CODINGS:
        found = [coding for part in encoding.split(",") if (coding := part.strip()) not in ("", "identity")]
        encoding = ", ".join(found)
        if not encoding:
            return data
    if encoding not in _CODINGS:
        raise UnsupportedMediaType(
            f'Content-Encoding "{encoding[:40]}" is not supported; use gzip or deflate',
            expected=["gzip", "deflate"],
        )
    max_bytes = min(allowance.most_bytes, max(_FREE_EXPANSION_BYTES, _MOST_EXPANSION * len(data)))
    try:
        plain, reserved = _inflate(data, _GZIP_OR_ZLIB, encoding, max_bytes, allowance)
    except zlib.error:
        if encoding != "deflate":
            raise MalformedBody(f"the body is not {encoding} data") from None
        # "deflate" means zlib's format (RFC 9110, 8.4.1.2), but some clients send the bare stream.
        try:
            plain, reserved = _inflate(data, -zlib.MAX_WBITS, encoding, max_bytes, allowance)
        except zlib.error:
            raise MalformedBody("the body is not deflate data") from None
    allowance.give_back(reserved - len(plain))
    return plain


def _inflate(
    data: Data, wbits: int, encoding: str, max_bytes: int, allowance: Allowance
) -> tuple[bytes, int]:
    """Decompress `data` in pieces: the GIL is held for each of them, and not for a copy of all of them.

    Also returns how many bytes are reserved: as many as the output has turned out to need, because what a
    body may become at most is a hundred times its size.
    """
    stream = zlib.decompressobj(wbits)
    plain = BytesIO()
    size = reserved = 0
    members = 1
    view = memoryview(data)
    for start in range(0, len(data), _PIECE_BYTES):
        rest: Data = view[start : start + _PIECE_BYTES]
        while rest:
            if stream.eof:
                # Members of gzip may follow one another (RFC 1952, 2.2).
                if encoding == "deflate" or rest[0] != _GZIP_STARTS_WITH:
                    raise MalformedBody(f"the {encoding} data is followed by more")
                members += 1
                if members > _MOST_MEMBERS:
                    raise MalformedBody(
                        f"the {encoding} data has more than {_MOST_MEMBERS} members; compress it as one"
                    )
                stream = zlib.decompressobj(_GZIP)
            piece = stream.decompress(rest, _PIECE_BYTES)
            size += len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            reserved += _reserve(size, reserved, allowance)
            plain.write(piece)
            rest = stream.unused_data if stream.eof else stream.unconsumed_tail
    # The rest of the output, if it did not fit into the last piece.
    while not stream.eof and (piece := stream.decompress(b"", _PIECE_BYTES)):
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        reserved += _reserve(size, reserved, allowance)
        plain.write(piece)
    if not stream.eof:
        raise MalformedBody(f"the {encoding} data is cut off")
    return plain.getvalue(), reserved


def _reserve(size: int, reserved: int, allowance: Allowance) -> int:
    """Reserve what an output of `size` bytes needs beyond `reserved` bytes; returns how many that are."""
    # The output grows in place, by an eighth more than it needs; a piece is held beside it.
    needed = size + size // 8 + _PIECE_BYTES
    if needed <= reserved:
        return 0
    more = max(needed - reserved, _STEP_BYTES)
    allowance.take(more, "decompressing the body")
    return more


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the decompressed body is larger than {max_bytes} bytes, the most that is accepted", limit=max_bytes
    )


def gzipped(parts: Sequence[Data]) -> bytes | None:
    """The concatenated `parts` as gzip; None if they hardly shrink."""
    tried = bytearray()
    for part in parts:
        tried += part[: _TRIED_BYTES - len(tried)]
    if len(zlib.compress(tried, _FASTEST)) > _WORTHWHILE_SHARE * len(tried):
        return None
    stream = zlib.compressobj(_FASTEST, wbits=_GZIP)
    # In pieces, because zlib holds the GIL while it joins its output; a join of `bytes` does not.
    packed = [stream.compress(piece) for part in parts for piece in pieces(part)]
    return b"".join((*packed, stream.flush()))
