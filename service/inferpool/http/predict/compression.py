"""Content-Encoding: request bodies unpacked within their limit, answers packed where the caller asks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from inferpool.errors import BodyTooLarge, MalformedBody, UnsupportedMediaType
from inferpool.http.predict.api import Data

_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS

_EXPANDED_BYTES: Final = 1024 * 1024
_MOST_EXPANSION: Final = 100
"""A body may unpack to a megabyte, or to so many times its size: more is no data but an attack."""
_GZIP: Final = 16 + zlib.MAX_WBITS
_FASTEST: Final = 1
_TRIED_BYTES: Final = 16 * 1024
"""So much of an answer is packed to see whether the rest is worth it."""
_WORTH_IT: Final = 0.8
"""Random numbers in binary form shrink by some 8 %, for 20 times the time it takes to send them."""


def decompress(data: Data, encoding: str, max_bytes: int) -> Data:
    """A body without its Content-Encoding: gzip, deflate, or none.

    Raises BodyTooLarge as soon as more than `max_bytes` have come out, UnsupportedMediaType for other
    encodings, MalformedBody for data that is damaged or cut off.
    """
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedMediaType(
            f'Content-Encoding "{encoding[:40]}" is not taken', expected=["gzip", "deflate"]
        )
    max_bytes = min(max_bytes, max(_EXPANDED_BYTES, _MOST_EXPANSION * len(data)))
    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = stream.decompress(data, max_bytes + 1)
    except zlib.error:
        if encoding != "deflate":
            raise MalformedBody(f"the body is not {encoding} data") from None
        # "deflate" means zlib's format (RFC 9110, 8.4.1.2), but some send the bare stream.
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            plain = stream.decompress(data, max_bytes + 1)
        except zlib.error:
            raise MalformedBody("the body is not deflate data") from None
    if len(plain) > max_bytes:
        raise BodyTooLarge(f"the body is larger than {max_bytes} bytes when decompressed", limit=max_bytes)
    if not stream.eof or stream.unused_data:
        raise MalformedBody(f"the {encoding} data is {'cut off' if not stream.eof else 'followed by more'}")
    return plain


def takes_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding header (RFC 9110, 12.5.3) lets an answer be gzip."""
    if not accept_encoding:
        return False
    weights = read_weights(accept_encoding)
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def read_weights(header: str) -> dict[str, float]:
    """The names in an Accept or Accept-Encoding header, lower-case, with their weights (RFC 9110, 12.4.2)."""
    weights: dict[str, float] = {}
    for part in header.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0.0
    return weights


def gzipped(parts: Sequence[Data]) -> bytes | None:
    """`parts`, one after the other, as gzip; None where they hardly shrink."""
    tried = bytearray()
    for part in parts:
        tried += part[: _TRIED_BYTES - len(tried)]
    if len(zlib.compress(tried, _FASTEST)) > _WORTH_IT * len(tried):
        return None
    stream = zlib.compressobj(_FASTEST, wbits=_GZIP)
    return b"".join((*map(stream.compress, parts), stream.flush()))
