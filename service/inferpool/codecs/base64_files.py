"""Reads pictures that stand in JSON: as base64 (RFC 4648, section 4), as data URLs (RFC 2397) or URLs."""

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
_WEB: Final = ("http://", "https://")
_LINE_ENDS: Final = str.maketrans("", "", "\r\n")
_PIECE_CHARACTERS: Final = 256 * 1024
"""Characters that are decoded at a time; they take half a millisecond."""
_COPIES: Final = 3
"""How many copies of a text decoding makes at most: without line ends, as bytes, and the file."""


def read_base64(name: str, texts: Sequence[str], allowance: Allowance) -> Iterator[bytes]:
    """Return the files in `texts`, which a request has sent for the input `name`, one after the other.

    Raises InvalidInput with the index of a text that is no base64 and no URL that is fetched, and what
    `Allowance.take` and `Allowance.fetch_picture` raise.
    """
    allowance.take(_COPIES * max(map(len, texts), default=0), "reading the base64 of a picture")
    for index, text in enumerate(texts):
        found = _DATA_URL.match(text)
        fetched = 0
        try:
            if text[:8].lower().startswith(_WEB):
                file = allowance.fetch_picture(text)
                fetched = len(file)
            else:
                file = _decode(text, found.end() if found else 0)
        except ValueError as error:
            raise _refusal(
                name, index, text, f"it takes a picture in base64, or a data URL: {error}"
            ) from None
        except InvalidInput as refusal:
            raise _refusal(name, index, text, refusal.detail) from None
        yield file
        allowance.give_back(fetched)


def _refusal(name: str, index: int, text: str, reason: str) -> InvalidInput:
    return InvalidInput(
        f"tensor {name_text(name)} at [{index}] is {value_text(text)}; {reason}", tensor=name, index=[index]
    )


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
