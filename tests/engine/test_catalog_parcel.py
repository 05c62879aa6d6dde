"""A catalog crosses in a memory file that nobody can change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.engine.catalog_parcel import pack, unpack

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)


@contextlib.contextmanager
def packed(catalog: dict[str, Any], *contents: bytes) -> Iterator[int]:
    descriptor = pack(catalog, {hashlib.sha256(content).hexdigest(): content for content in contents})
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@given(st.dictionaries(st.text(), JSON, max_size=3), st.lists(st.binary(), max_size=3))
def test_a_parcel_is_unpacked_as_it_was_packed(catalog: dict[str, Any], contents: list[bytes]) -> None:
    with packed(catalog, *contents) as descriptor:
        for _ in range(2):  # a reader does not move the offset of another
            parcel = unpack(descriptor)
            assert parcel.catalog == catalog
            assert list(parcel.files.values()) == list(dict.fromkeys(contents))


def test_a_parcel_passes_through_a_socket_whatever_its_size() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    content = os.urandom(5_000_000)
    with one, other, packed({"models": {}}, content) as descriptor:
        socket.send_fds(one, [b"{}"], [descriptor])
        _, [received], _, _ = socket.recv_fds(other, 100, 1)
        assert list(unpack(received).files.values()) == [content]
        os.close(received)


def test_nobody_can_change_a_parcel() -> None:
    with packed({}) as descriptor:
        for change in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 1),
            lambda: os.ftruncate(descriptor, 10_000),
        ):
            with pytest.raises(PermissionError):
                change()


def sealed(content: bytes) -> int:
    import fcntl

    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 15)
    return descriptor


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no line",
        b"[]\n",
        b'{"catalog":2}\n{}',
        b'{"catalog":9,"files":[]}\n{}',
        b'{"catalog":2,"files":[]}\n{}more',
        b'{"catalog":2,"files":[["00",1]]}\n{}x',
        b'{"catalog":2,"files":7}\n{}',
    ],
)
def test_anything_else_is_refused(content: bytes) -> None:
    descriptor = sealed(content)
    with pytest.raises(ValueError, match=r"."):
        unpack(descriptor)
    os.close(descriptor)


def test_a_file_that_is_not_sealed_is_refused() -> None:
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    with pytest.raises(ValueError, match="sealed"):
        unpack(descriptor)
    os.close(descriptor)
