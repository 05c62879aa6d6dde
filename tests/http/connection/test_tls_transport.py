"""The transport of TLS connections gives the TLS layer no more than the client reads."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from inferpool.http.connection.tls_transport import PIECE_BYTES, TlsTransport


class TlsLayer:
    """A TLS layer that says it is full after `room` bytes, and counts what it was given."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = b""
        self.unread = 0
        self.closed = self.aborted = False
        self.transport: TlsTransport

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        assert low == 0 < high < PIECE_BYTES

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += bytes(data)
        self.unread += len(data)
        if self.unread > self.room:
            self.transport.filled()

    def read(self) -> None:
        self.unread = 0
        self.transport.emptied()

    def get_write_buffer_size(self) -> int:
        return self.unread

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return None if name == "socket" else default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


class Writer:
    """A protocol that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def writing_paused(self) -> None:
        self.told.append("paused")

    def writing_resumed(self) -> None:
        self.told.append("resumed")


def make(room: int, loop: asyncio.AbstractEventLoop) -> tuple[TlsTransport, TlsLayer, Writer]:
    layer, writer = TlsLayer(room), Writer()
    layer.transport = TlsTransport(layer, writer, loop)
    return layer.transport, layer, writer


def test_a_large_response_is_encrypted_piece_by_piece_as_the_client_reads() -> None:
    loop = asyncio.new_event_loop()
    transport, layer, writer = make(PIECE_BYTES, loop)
    data = bytes(range(256)) * 4000
    transport.write(data)
    assert len(layer.written) <= 2 * PIECE_BYTES
    assert transport.get_write_buffer_size() == len(data)
    assert writer.told == ["paused"]
    transport.write(b"the next response")
    transport.close()
    reads = 0
    while layer.written != data + b"the next response":
        assert not layer.closed
        layer.read()
        reads += 1
        assert transport.get_write_buffer_size() <= len(data) + 17 - (reads - 1) * PIECE_BYTES
    layer.read()
    assert writer.told == ["paused", "resumed"]
    assert layer.closed
    loop.close()


def test_small_responses_go_straight_to_the_tls_layer() -> None:
    loop = asyncio.new_event_loop()
    transport, layer, writer = make(10 * PIECE_BYTES, loop)
    transport.write(b"a")
    transport.write(b"b" * PIECE_BYTES)
    assert layer.written == b"a" + b"b" * PIECE_BYTES
    assert writer.told == []
    loop.close()


def test_a_lost_connection_keeps_nothing() -> None:
    loop = cast("Any", asyncio.new_event_loop())
    transport, layer, _ = make(0, loop)
    transport.write(b"x" * 10 * PIECE_BYTES)
    transport.lose()
    assert transport.get_write_buffer_size() == layer.unread
    layer.read()
    assert len(layer.written) == PIECE_BYTES
    transport.write(b"late")
    assert len(layer.written) == PIECE_BYTES
    loop.close()
