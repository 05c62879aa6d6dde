"""What a batch's answers are written by: every byte goes once, in order, whatever the sockets do."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from inferpool.http.connection import batched_writes
from inferpool.http.connection.batched_writes import WriteBatcher


class PendingWrite:
    """Notes what was left of its answer."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.left: bytes | None = None
        self._fault = fault

    def sent(self, left: bytes) -> None:
        assert self.left is None, "told once"
        self.left = left
        if self._fault is not None:
            raise self._fault


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Connected sockets, the server's and the client's end of each; the server's do not block."""
    assert batched_writes._socketio is not None or "CI" not in os.environ, "CI has a compiler"
    if batched_writes._socketio is None:
        pytest.skip("the project was installed without a C compiler")
    made = [socket.socketpair() for _ in range(3)]
    for server, client in made:
        server.setblocking(False)
        client.settimeout(10)
    yield made
    for server, client in made:
        server.close()
        client.close()


def fire(pairs: list[Pair], bodies: list[bytes], shots: list[PendingWrite]) -> None:
    own = WriteBatcher()
    own.load()
    assert own.loading
    for (server, _), body, shot in zip(pairs, bodies, shots, strict=True):
        own.add(server.fileno(), body, shot)
    own.fire()
    assert not own.loading


def test_each_socket_gets_its_own(pairs: list[Pair]) -> None:
    bodies, shots = [b"one", b"two, longer", b"three"], [PendingWrite(), PendingWrite(), PendingWrite()]
    fire(pairs, bodies, shots)
    assert [client.recv(100) for _, client in pairs] == bodies
    assert [shot.left for shot in shots] == [b"", b"", b""]


def test_what_a_full_socket_does_not_take_is_left(pairs: list[Pair]) -> None:
    """Part of it, or all of it where nothing fits any more."""
    pairs[0][0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            pairs[1][0].send(b"x" * 65536)
    body, shots = bytes(range(256)) * 8192, [PendingWrite(), PendingWrite(), PendingWrite()]
    fire(pairs, [body, b"late", b"here"], shots)
    taken = len(body) - len(shots[0].left or b"")
    assert 0 < taken < len(body)
    assert body.endswith(shots[0].left or b"nothing was left")
    came = b""
    while len(came) < taken:
        came += pairs[0][1].recv(65536)
    assert came == body[:taken]
    assert shots[1].left == b"late"
    assert pairs[2][1].recv(100) == b"here"


def test_a_client_that_has_gone_costs_the_others_nothing(pairs: list[Pair]) -> None:
    """No signal for a broken pipe either, and the fault of one answer stays its own."""
    pairs[0][1].close()
    shots = [PendingWrite(), PendingWrite(ValueError("on purpose")), PendingWrite()]
    fire(pairs, [b"a", b"b", b"c"], shots)
    assert [shot.left for shot in shots] == [b"a", b"", b""]
    assert pairs[2][1].recv(100) == b"c"


def test_without_memory_each_is_written_by_itself(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(sockets: list[int], bodies: list[bytes]) -> list[int]:
        raise MemoryError

    monkeypatch.setattr(batched_writes, "_socketio", SimpleNamespace(send_all=exhausted))
    shots = [PendingWrite(), PendingWrite(), PendingWrite()]
    fire(pairs, [b"a", b"b", b"c"], shots)
    assert [shot.left for shot in shots] == [b"a", b"b", b"c"]


def test_a_single_answer_goes_by_its_transport(pairs: list[Pair]) -> None:
    shot = PendingWrite()
    fire(pairs[:1], [b"alone"], [shot])
    assert shot.left == b"alone"


def test_without_the_module_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_writes, "_socketio", None)
    own = WriteBatcher()
    own.load()
    assert not own.loading
    own.fire()


@pytest.mark.parametrize("wrong", [([1], []), ((1,), [b""]), ([1], ["text"]), ([-1], [b""]), (["1"], [b""])])
def test_nonsense_is_refused(wrong: tuple[object, object], pairs: list[Pair]) -> None:
    with pytest.raises((TypeError, ValueError)):
        batched_writes._socketio.send_all(*wrong)
