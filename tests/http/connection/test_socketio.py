"""The module in C for sockets: what it reads, and what it refuses; `tests/fuzz` covers the rest."""

from __future__ import annotations

import importlib
import os
import select
import socket
from collections.abc import Iterator
from types import ModuleType

import pytest

Pair = tuple[socket.socket, socket.socket]

try:
    _socketio: ModuleType = importlib.import_module("inferpool.http.connection._socketio")
except ImportError:  # there was no C compiler at installation, or the system is not Linux
    assert "CI" not in os.environ, "CI has a compiler"
    pytest.skip("the project was installed without a C compiler", allow_module_level=True)


class Watched:
    """Connected pairs of sockets; epoll watches the first of each."""

    def __init__(self, count: int) -> None:
        self.pairs: list[Pair] = [socket.socketpair() for _ in range(count)]
        self.poll = select.epoll()
        for near, _ in self.pairs:
            near.setblocking(False)
            self.poll.register(near.fileno(), select.EPOLLIN)

    def receive(self, size: int = 1000, most: int = 100) -> dict[int, bytes | None]:
        """Return what one call reads, by the index of the pair."""
        found = _socketio.receive(self.poll.fileno(), bytearray(size), most)
        indices = {near.fileno(): index for index, (near, _) in enumerate(self.pairs)}
        assert len(found) == len(dict(found)), "each socket once"
        return {indices[descriptor]: data for descriptor, data in found}


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched(4)
    yield made
    made.poll.close()
    for pair in made.pairs:
        for end in pair:
            end.close()


def test_receive_reads_what_is_there_without_waiting(watched: Watched) -> None:
    assert watched.receive() == {}
    watched.pairs[1][1].sendall(b"one")
    watched.pairs[3][1].sendall(b"\0three")
    assert watched.receive() == {1: b"one", 3: b"\0three"}
    assert watched.receive() == {}


def test_receive_reports_the_end_after_the_last_bytes(watched: Watched) -> None:
    watched.pairs[0][1].sendall(b"last")
    watched.pairs[0][1].close()
    assert watched.receive() == {0: b"last"}
    assert watched.receive() == {0: None}
    assert watched.receive() == {0: None}, "as long as the socket is watched"


def test_receive_reads_no_more_than_fits_and_the_other_sockets_are_next(watched: Watched) -> None:
    for number, (_, far) in enumerate(watched.pairs):
        far.sendall(bytes([number]) * 150)
    read = dict.fromkeys(range(4), b"")
    for calls in range(1, 5):
        found = watched.receive(size=200, most=100)
        assert 1 <= len(found) <= 2
        for number, data in found.items():
            assert data is not None
            assert len(data) <= 100
            read[number] += data
        if calls == 2:
            assert all(read.values()), "no socket is passed over"
    assert read == {number: bytes([number]) * 150 for number in range(4)}


@pytest.mark.parametrize("wrong", [(1,), (1, b"", 1), ("1", bytearray(1), 1), (1, bytearray(1), None)])
def test_receive_refuses_other_types(wrong: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        _socketio.receive(*wrong)


def test_receive_refuses_impossible_sizes_and_descriptors() -> None:
    for most in (0, -1, 2):
        with pytest.raises(ValueError, match="from 1 to the length"):
            _socketio.receive(1, bytearray(1), most)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _socketio.receive(2**31 - 1, bytearray(1), 1)


@pytest.mark.parametrize("wrong", [([1], []), ((1,), [b""]), ([1], ["text"]), (["1"], [b""]), ([1],)])
def test_send_all_refuses_other_types_and_lengths(wrong: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        _socketio.send_all(*wrong)


@pytest.mark.parametrize("descriptor", [-1, 2**31, 2**64, -(2**64)])
def test_numbers_that_cannot_be_descriptors_are_refused(descriptor: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 2147483647"):
        _socketio.send_all([descriptor], [b""])
    with pytest.raises(ValueError, match="from 0 to 2147483647"):
        _socketio.receive(descriptor, bytearray(1), 1)
