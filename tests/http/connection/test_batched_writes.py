"""Responses of one batch are written together: every byte once and in order, whatever the sockets do."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from inferpool.http.connection import batched_writes
from inferpool.http.connection.batched_writes import WriteBatcher


class Pending:
    """Notes the rest of its response that was not sent."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.rest: bytes | None = None
        self.error: Exception | None = None
        self._fault = fault

    def sent(self, rest: bytes) -> None:
        assert self.rest is None, "told once"
        self.rest = rest
        if self._fault is not None:
            raise self._fault

    def not_sent(self, error: Exception) -> None:
        self.error = error


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Connected sockets, the server's and the client's end of each; the server's do not block."""
    compiled = vars(batched_writes)["_socketio"] is not None
    assert compiled or "CI" not in os.environ, "CI has a compiler"
    if not compiled:
        pytest.skip("the project was installed without a C compiler")
    made = [socket.socketpair() for _ in range(3)]
    for server, client in made:
        server.setblocking(False)
        client.settimeout(10)
    yield made
    for server, client in made:
        server.close()
        client.close()


def write_together(pairs: list[Pair], bodies: list[bytes], writes: list[Pending]) -> None:
    own = WriteBatcher()
    own.begin()
    assert own.collecting
    for (server, _), body, write in zip(pairs, bodies, writes, strict=True):
        own.add(server.fileno(), body, write)
    own.flush()
    assert not own.collecting


def test_each_socket_gets_its_own_response(pairs: list[Pair]) -> None:
    bodies, writes = [b"one", b"two, longer", b"three"], [Pending(), Pending(), Pending()]
    write_together(pairs, bodies, writes)
    assert [client.recv(100) for _, client in pairs] == bodies
    assert [write.rest for write in writes] == [b"", b"", b""]


def test_a_full_socket_leaves_the_rest_to_its_transport(pairs: list[Pair]) -> None:
    """The rest may be the whole response."""
    pairs[0][0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            pairs[1][0].send(b"x" * 65536)
    body, writes = bytes(range(256)) * 8192, [Pending(), Pending(), Pending()]
    write_together(pairs, [body, b"late", b"here"], writes)
    taken = len(body) - len(writes[0].rest or b"")
    assert 0 < taken < len(body)
    assert body.endswith(writes[0].rest or b"nothing was left")
    came = b""
    while len(came) < taken:
        came += pairs[0][1].recv(65536)
    assert came == body[:taken]
    assert writes[1].rest == b"late"
    assert pairs[2][1].recv(100) == b"here"


def test_a_closed_socket_does_not_disturb_the_others(pairs: list[Pair]) -> None:
    """A broken pipe raises no signal, and an error of one response stays its own."""
    pairs[0][1].close()
    writes = [Pending(), Pending(ValueError("on purpose")), Pending()]
    write_together(pairs, [b"a", b"b", b"c"], writes)
    assert [write.rest for write in writes] == [b"a", b"", b""]
    assert pairs[2][1].recv(100) == b"c"


def test_without_memory_each_transport_writes_its_own_response(
    pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(sockets: list[int], bodies: list[bytes]) -> list[int]:
        raise MemoryError

    monkeypatch.setattr(batched_writes, "_socketio", SimpleNamespace(send_all=exhausted))
    writes = [Pending(), Pending(), Pending()]
    write_together(pairs, [b"a", b"b", b"c"], writes)
    assert [write.rest for write in writes] == [b"a", b"b", b"c"]


def test_a_single_response_is_written_by_its_transport(pairs: list[Pair]) -> None:
    write = Pending()
    write_together(pairs[:1], [b"alone"], [write])
    assert write.rest == b"alone"


def test_without_the_c_module_nothing_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_writes, "_socketio", None)
    own = WriteBatcher()
    own.begin()
    assert not own.collecting
    own.flush()


def test_responses_whose_writing_fails_end_one_and_all(
    pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sockets: list[int], bodies: list[bytes]) -> list[int]:
        raise OSError("on purpose")

    monkeypatch.setattr(batched_writes, "_socketio", SimpleNamespace(send_all=fail))
    writes = [Pending(), Pending(), Pending()]
    write_together(pairs, [b"one", b"two", b"three"], writes)
    assert [str(write.error) for write in writes] == ["on purpose"] * 3
    assert [write.rest for write in writes] == [None] * 3
