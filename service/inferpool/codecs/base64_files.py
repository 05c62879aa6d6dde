"""Reads pictures that stand in JSON: as base64 (RFC 4648, section 4), or as a data URL (RFC 2397)."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Final

from inferpool.allowance import Allowance
from inferpool.errors import InvalidInput
from inferpool.tensors import name_text, value_text

_DATA_URL: Final = re.compile(r"data:[\w.+-]{1,40}/[\w.+-]{1,40};base64,", re.IGNORECASE)
_LINE_ENDS: Final = str.maketrans("", "", "\r\n")
_PIECE_CHARACTERS: Final = 256 * 1024
"""Characters that are decoded at a time; they take half a millisecond."""
_COPIES: Final = 3
"""How many copies of a text decoding makes at most: without line ends, as bytes, and the file."""


def read_base64(name: str, texts: Sequence[str], allowance: Allowance) -> Iterator[bytes]:
    """Return the files in `texts`, which a request has sent for the input `name`, one after the other.

    Raises InvalidInput with the index of a text that is no base64, and what `Allowance.take` raises.
    """
    allowance.take(_COPIES * max(map(len, texts), default=0), "reading the base64 of a picture")
    for index, text in enumerate(texts):
        found = _DATA_URL.match(text)
        try:
            yield _decode(text, found.end() if found else 0)
        except ValueError as error:
            reason = (
                "URLs of pictures are not fetched; send the picture itself"
                if text[:8].lower().startswith(("http://", "https://"))
                else f"it takes a picture in base64, or a data URL: {error}"
            )
            raise InvalidInput(
                f"tensor {name_text(name)} at [{index}] is {value_text(text)}; {reason}",
                tensor=name,
                index=[index],
            ) from None


def _decode(text: str, start: int) -> bytes:
    """Return the file in `text` from `start` on; raises ValueError if it is no base64.

    It is decoded in pieces, because each call holds the GIL until it is done.
    """
    file = BytesIO()
    waiting = ""
    ended = False
    for at in range(start, len(text), _PIECE_CHARACTERS):
        piece = waiting + text[at : at + _PIECE_CHARACTERS].translate(_LINE_ENDS)
        last = at + _PIECE_CHARACTERS >= len(text)
        whole = len(piece) if last else len(piece) - len(piece) % 4
        piece, waiting = piece[:whole], piece[whole:]
        if piece and ended:
            raise ValueError("Excess data after padding")
        file.write(binascii.a2b_base64(piece, strict_mode=True))
        ended = ended or piece.endswith("=")
    return file.getvalue()
