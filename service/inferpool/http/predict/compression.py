"""Content-Encoding: decompresses request bodies within their limit and compresses responses on request."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from inferpool.allowance import Allowance
from inferpool.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType
from inferpool.http.predict.api import Data

_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS

_FREE_EXPANSION_BYTES: Final = 1024 * 1024
_MOST_EXPANSION: Final = 100
"""A body may decompress to 1 MiB or to this many times its size; more is an attack."""
_JOINED: Final = 2
"""Bytes of memory for each byte that is decompressed."""
_GZIP: Final = 16 + zlib.MAX_WBITS
_FASTEST: Final = 1
_TRIED_BYTES: Final = 16 * 1024
"""Bytes at the start of a response that are compressed to estimate whether the rest shrinks."""
_WORTHWHILE_SHARE: Final = 0.8
"""The largest share that is worth the time. Random binary numbers shrink by about 8 % only, and compressing
them takes 20 times as long as sending them."""


def decompress(data: Data, encoding: str, allowance: Allowance) -> Data:
    """Decompress a body whose Content-Encoding is gzip, deflate or none.

    Raises BodyTooLarge as soon as the output exceeds `allowance.most_bytes`, UnsupportedMediaType for other
    encodings, MalformedBody for data that is damaged or cut off, and what `Allowance.take` raises.
    """
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedMediaType(
            f'Content-Encoding "{encoding[:40]}" is not supported; use gzip or deflate',
            expected=["gzip", "deflate"],
        )
    max_bytes = min(allowance.most_bytes, max(_FREE_EXPANSION_BYTES, _MOST_EXPANSION * len(data)))
    # The output comes in blocks, which are joined at the end.
    reserved = _JOINED * max_bytes
    allowance.take(reserved, "decompressing the body")
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = stream.decompress(data, max_bytes + 1)
    except zlib.error:
        if encoding != "deflate":
            raise MalformedBody(f"the body is not {encoding} data") from None
        # "deflate" means zlib's format (RFC 9110, 8.4.1.2), but some clients send the bare stream.
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            plain = stream.decompress(data, max_bytes + 1)
        except zlib.error:
            raise MalformedBody("the body is not deflate data") from None
    if len(plain) > max_bytes:
        raise BodyTooLarge(
            f"the decompressed body is larger than {max_bytes} bytes, the most that is accepted",
            limit=max_bytes,
        )
    if not stream.eof or stream.unused_data:
        raise MalformedBody(f"the {encoding} data is {'cut off' if not stream.eof else 'followed by more'}")
    allowance.give_back(reserved - len(plain))
    return plain


def gzipped(parts: Sequence[Data]) -> bytes | None:
    """The concatenated `parts` as gzip; None if they hardly shrink."""
    tried = bytearray()
    for part in parts:
        tried += part[: _TRIED_BYTES - len(tried)]
    if len(zlib.compress(tried, _FASTEST)) > _WORTHWHILE_SHARE * len(tried):
        return None
    stream = zlib.compressobj(_FASTEST, wbits=_GZIP)
    return b"".join((*map(stream.compress, parts), stream.flush()))
