"""Base64 is decoded in pieces, with the results and the errors of one call."""

from __future__ import annotations

import base64
import binascii
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.allowance import UNLIMITED
from inferpool.codecs import base64_files
from inferpool.codecs.base64_files import read_base64
from inferpool.errors import InvalidInput

CHARACTERS = st.sampled_from("AQgw+/==\r\n-")


def whole(text: str) -> bytes | None:
    """What one call makes of `text`; None if it refuses it."""
    plain = text.replace("\r", "").replace("\n", "")
    with contextlib.suppress(ValueError):
        return binascii.a2b_base64(plain, strict_mode=True)
    return None


def in_pieces(text: str) -> bytes | None:
    with contextlib.suppress(InvalidInput):
        return next(read_base64("x", [text], UNLIMITED))
    return None


@given(
    st.integers(1, 9),
    st.one_of(
        st.text(CHARACTERS, max_size=40),
        st.binary(max_size=40).map(lambda content: base64.encodebytes(content).decode()),
        st.lists(st.binary(max_size=9), max_size=3).map(
            lambda parts: "\n".join(base64.b64encode(part).decode() for part in parts)
        ),
    ),
)
def test_pieces_are_read_as_the_whole(size: int, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base64_files, "_PIECE_CHARACTERS", size)
        assert in_pieces(text) == whole(text)
        assert in_pieces(f"data:image/png;base64,{text}") == whole(text)


def test_a_large_picture_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = binascii.a2b_base64

    def noting(text: str, *, strict_mode: bool) -> bytes:
        sizes.append(len(text))
        return decode(text, strict_mode=strict_mode)

    monkeypatch.setattr(binascii, "a2b_base64", noting)
    content = bytes(range(256)) * 4000
    assert in_pieces(base64.encodebytes(content).decode()) == content
    assert sum(sizes) > 1_000_000
    assert max(sizes) < 300_000
