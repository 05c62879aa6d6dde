"""TLS between a TCP transport and the protocol of a connection, without sockets."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import uvloop
from inferpool.http.access.tls import TlsFiles, make_context
from inferpool.http.connection.tls_handshake import TlsHandshake
from inferpool.http.connection.tls_records import TlsRecords
from inferpool.http.connection.tls_transport import MOST_UNREAD_BYTES, PIECE_BYTES, TlsTransport

from tests.certificates import Authority
from tests.http.connection.fakes import FakeLoop
from tests.http.connection.tls_client import (
    ALERT,
    CLOSE_NOTIFY,
    HANDSHAKE,
    UPDATE_REQUESTED,
    RecordForger,
    TlsClient,
)


class Tcp:
    """A TCP transport whose client leaves what is written unread, once there is no room for more."""

    def __init__(self) -> None:
        self.written = b""
        self.unread = 0
        self.room = 1 << 40
        self.owner: TlsTransport | None = None
        self.closed = self.aborted = self.paused = self.ended = False

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        assert low == 0 < high < PIECE_BYTES

    def write(self, data: bytes) -> None:
        assert data
        assert not self.closed
        assert not self.ended
        self.written += data
        if len(self.written) > self.room:
            self.unread = len(self.written)
            assert self.owner is not None
            self.owner.pause_writing()

    def take(self) -> bytes:
        """Let the client read."""
        data, self.written, unread, self.unread = self.written, b"", self.unread, 0
        if unread and self.owner is not None:
            self.owner.resume_writing()
        return data

    def get_write_buffer_size(self) -> int:
        return self.unread

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("192.0.2.1", 1)}.get(name, default)

    def is_closing(self) -> bool:
        return self.closed

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Protocol(asyncio.Protocol):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.keeps_half_open = False
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.told.append(data)

    def eof_received(self) -> bool:
        self.told.append("end")
        return self.keeps_half_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")

    def pause_writing(self) -> None:
        self.told.append("paused")

    def resume_writing(self) -> None:
        self.told.append("resumed")


class Memory(asyncio.BufferedProtocol):
    """Receives into one buffer, and passes on when it is full."""

    def __init__(self, protocol: Protocol, size: int) -> None:
        self.memory = bytearray(size)
        self.sizes: list[int] = []
        self._protocol = protocol

    def get_buffer(self, sizehint: int) -> memoryview:
        filled = sum(self.sizes)
        return memoryview(self.memory)[filled:] if filled < len(self.memory) else memoryview(bytearray(100))

    def buffer_updated(self, nbytes: int) -> None:
        self.sizes.append(nbytes)

    def eof_received(self) -> bool:
        return self._protocol.eof_received()


class Pair:
    """A client and the server's side of its connection, whose handshake is complete."""

    def __init__(self, files: TlsFiles, authority: Authority, key_log: Path | None = None) -> None:
        self.loop, self.tcp, self.protocol = FakeLoop(), Tcp(), Protocol()
        context = authority.client_context()
        if key_log is not None:
            context.keylog_filename = str(key_log)
        self.client = TlsClient(context)
        self.records = TlsRecords(make_context(files))
        sent = self.client.shake_hands()
        for _ in range(2):
            # Each byte by itself.
            complete = False
            for byte in sent:
                assert not complete
                self.records.feed(bytes([byte]))
                complete = self.records.shake_hands()
            sent = self.client.shake_hands(self.records.output())
        assert complete
        self.transport = TlsTransport(self.tcp, self.records, self.protocol, self.loop)
        self.tcp.owner = self.transport
        self.transport.begin()
        assert self.protocol.transport is self.transport

    @property
    def told(self) -> list[Any]:
        return self.protocol.told

    def read(self) -> bytes:
        """Let the client read everything."""
        contents = b""
        while data := self.tcp.take():
            contents += self.client.decrypt(data)
            self.loop.settle()
        return contents


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def files(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    folder = tmp_path_factory.mktemp("tls")
    authority.issue(folder / "tls.crt", folder / "tls.key")
    return TlsFiles(folder / "tls.crt", folder / "tls.key", None)


@pytest.fixture
def pair(files: TlsFiles, authority: Authority) -> Pair:
    return Pair(files, authority)


@pytest.fixture
def forger(files: TlsFiles, authority: Authority, tmp_path: Path) -> tuple[Pair, RecordForger]:
    pair = Pair(files, authority, tmp_path / "keys.log")
    return pair, RecordForger(pair.client, tmp_path / "keys.log")


def test_the_content_of_records_arrives_however_they_are_cut(pair: Pair) -> None:
    for byte in pair.client.encrypt(b"a request"):
        pair.transport.data_received(bytes([byte]))
    assert pair.told == [b"a request"]
    pair.told.clear()
    # Several records, the end of one with the beginning of the next one.
    sent = b"".join(pair.client.encrypt(bytes([65 + number]) * 1000) for number in range(9))
    for piece in (sent[:1500], sent[1500:1501], sent[1501:5000], sent[5000:]):
        pair.transport.data_received(piece)
    assert b"".join(pair.told) == b"".join(bytes([65 + number]) * 1000 for number in range(9))
    assert len(pair.told) == 3


def test_one_write_of_the_client_is_one_piece_for_the_protocol(pair: Pair) -> None:
    data = os.urandom(100_000)
    sent = b"".join(pair.client.encrypt(data[at : at + 16384]) for at in range(0, len(data), 16384))
    pair.transport.data_received(sent)
    assert pair.told == [data]


def test_large_bodies_go_straight_to_their_memory(pair: Pair) -> None:
    data = os.urandom(150_000)
    memory = Memory(pair.protocol, len(data))
    pair.transport.set_protocol(memory)
    sent = b"".join(pair.client.encrypt(data[at : at + 16384]) for at in range(0, len(data), 16384))
    sent += pair.client.encrypt(b"next") + pair.client.close()
    for at in range(0, len(sent), 70_000):
        pair.transport.data_received(sent[at : at + 70_000])
    assert memory.memory == data
    assert sum(memory.sizes) == len(data) + len("next")
    assert len(memory.sizes) == 4, "one for each read, and one for what follows"
    assert pair.told == ["end"]


def test_a_protocol_that_does_not_read_is_given_nothing(pair: Pair) -> None:
    data = os.urandom(40_000)
    memory = Memory(pair.protocol, 10_000)
    pair.transport.set_protocol(memory)

    def pause(nbytes: int) -> None:
        memory.sizes.append(nbytes)
        pair.transport.pause_reading()

    memory.buffer_updated = pause  # type: ignore[method-assign]
    sent = b"".join(pair.client.encrypt(data[at : at + 10_000]) for at in range(0, len(data), 10_000))
    pair.transport.data_received(sent + pair.client.close())
    assert pair.tcp.paused
    assert memory.sizes == [10_000]
    for turn in range(2, 5):
        pair.transport.resume_reading()
        assert not pair.tcp.paused
        pair.loop.settle()
        assert sum(memory.sizes[1:]) == 100 * (turn - 1), "the next buffers take 100 bytes"
    assert pair.told == []
    assert memory.memory == data[:10_000]


@pytest.mark.parametrize("announced", [True, False])
def test_a_client_that_ends_its_side_gets_what_it_is_owed(pair: Pair, announced: bool) -> None:
    pair.protocol.keeps_half_open = True
    pair.transport.data_received(
        pair.client.encrypt(b"a request") + (pair.client.close() if announced else b"")
    )
    if not announced:
        assert pair.told == [b"a request"]
        assert pair.transport.eof_received(), "the TCP transport must not close by itself"
    assert pair.told == [b"a request", "end"]
    assert pair.tcp.paused
    pair.transport.resume_reading()
    pair.transport.data_received(b"nothing that counts")
    assert pair.transport.eof_received()
    pair.transport.write(b"the response")
    pair.transport.close()
    assert pair.read() == b"the response"
    assert pair.client.ended
    assert pair.tcp.closed
    assert pair.told == [b"a request", "end"]


def test_a_client_that_is_owed_nothing_is_told_the_end(pair: Pair) -> None:
    pair.transport.data_received(pair.client.close())
    assert pair.told == ["end"]
    assert pair.read() == b""
    assert pair.client.ended
    assert pair.tcp.closed
    assert not pair.tcp.aborted


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x17\x03\x03\x00\x20" + bytes(32), b"\x16\x03\x03\xff\xff"]
)
def test_garbage_behind_the_handshake_ends_the_connection(pair: Pair, garbage: bytes) -> None:
    pair.transport.data_received(pair.client.encrypt(b"a request"))
    pair.transport.data_received(garbage)
    assert pair.told == [b"a request"]
    assert pair.tcp.closed
    assert not pair.tcp.aborted
    assert pair.tcp.written[:3] == b"\x17\x03\x03", "an alert, encrypted"
    assert len(pair.tcp.written) == 24
    pair.transport.write(b"too late")
    pair.transport.data_received(b"more")
    pair.loop.advance(10)
    assert pair.tcp.aborted, "a client that does not read the alert"


def test_one_side_may_end_before_the_other(pair: Pair) -> None:
    pair.transport.write(b"the response")
    pair.transport.write_eof()
    pair.transport.write(b"nothing that counts")
    assert pair.read() == b"the response"
    assert pair.client.ended
    assert pair.tcp.ended
    assert not pair.tcp.closed
    pair.transport.close()
    assert pair.tcp.closed
    assert pair.tcp.written == b"", "the end is announced once"


def test_a_large_response_is_encrypted_piece_by_piece_as_the_client_reads(pair: Pair) -> None:
    pair.tcp.room = PIECE_BYTES
    data = bytes(range(256)) * 4000
    pair.transport.write(data)
    assert len(pair.tcp.written) <= 2.1 * PIECE_BYTES
    assert len(data) <= pair.transport.get_write_buffer_size() < len(data) + 1000
    assert pair.told == ["paused"]
    pair.transport.write(b"the next response")
    pair.transport.close()
    read = b""
    while len(read) < len(data) + 17:
        assert pair.tcp.closed <= (len(data) - len(read) < PIECE_BYTES)
        read += pair.client.decrypt(pair.tcp.take())
        assert pair.transport.get_write_buffer_size() <= 1.01 * (len(data) + 17 - len(read))
    assert read == data + b"the next response"
    pair.read()
    assert pair.client.ended
    assert pair.told == ["paused", "resumed"]
    assert pair.tcp.closed


def test_a_client_that_reads_at_once_does_not_hold_the_loop(pair: Pair) -> None:
    data = bytes(3 * 2**20)
    pair.transport.write(data)
    pair.transport.close()
    assert pair.told == ["paused"], "what waits is still the response of this client"
    assert len(pair.tcp.written) < 1.5 * 2**20
    assert pair.loop.ready, "the rest follows"
    turns = 0
    while pair.loop.ready:
        pair.loop.iterate()
        turns += 1
    assert turns >= 2
    assert pair.read() == data
    assert pair.told == ["paused", "resumed"]
    assert pair.tcp.closed


def test_records_of_a_batch_are_written_by_the_caller(pair: Pair) -> None:
    records = pair.transport.encrypt(b"the response")
    assert b"response" not in records
    assert pair.tcp.written == b""
    pair.transport.write_records(records[5:])
    assert pair.client.decrypt(records[:5] + pair.tcp.take()) == b"the response"
    content = pair.transport.decrypt(pair.client.encrypt(b"a request"))
    assert content == b"a request"
    assert pair.told == []


def test_keys_are_updated_whenever_the_client_wants(forger: tuple[Pair, RecordForger]) -> None:
    pair, forge = forger
    for number in range(3):
        pair.transport.data_received(forge.record(UPDATE_REQUESTED, HANDSHAKE))
        forge.update_keys()
        pair.transport.data_received(forge.record(b"a request"))
        pair.transport.write(b"response %d" % number)
        assert pair.read() == b"response %d" % number
    assert pair.told == [b"a request"] * 3
    pair.transport.data_received(forge.record(CLOSE_NOTIFY, ALERT))
    assert pair.told[-1] == "end"


def test_a_response_waits_for_the_rest_of_a_key_update(forger: tuple[Pair, RecordForger]) -> None:
    """OpenSSL encrypts nothing while it has a part of a message."""
    pair, forge = forger
    pair.transport.data_received(forge.record(UPDATE_REQUESTED[:4], HANDSHAKE))
    pair.transport.write(b"one ")
    assert pair.transport.encrypt(b"two ") == b""
    pair.transport.write(b"three")
    assert pair.told == ["paused"]
    assert pair.transport.get_write_buffer_size() == len(b"one two three")
    pair.transport.close()
    assert not pair.tcp.closed
    pair.transport.abort()
    assert pair.tcp.aborted


def test_a_response_goes_on_behind_a_key_update(forger: tuple[Pair, RecordForger]) -> None:
    pair, forge = forger
    pair.transport.data_received(forge.record(UPDATE_REQUESTED[:4], HANDSHAKE))
    pair.transport.write(b"one ")
    pair.transport.write(b"two")
    pair.transport.data_received(forge.record(UPDATE_REQUESTED[4:], HANDSHAKE))
    assert pair.read() == b"one two"
    assert pair.told == ["paused", "resumed"]


@pytest.mark.parametrize("unread", [0, MOST_UNREAD_BYTES + 1])
def test_a_client_that_reads_nothing_cannot_make_the_server_write(pair: Pair, unread: int) -> None:
    pair.records.encrypt(b"what OpenSSL sends unasked")
    pair.tcp.unread = unread
    pair.transport.data_received(pair.client.encrypt(b"a request"))
    assert pair.tcp.aborted is (unread > 0)
    assert bool(pair.tcp.written) is (unread == 0)


def test_a_slow_client_gets_a_large_response(files: TlsFiles, authority: Authority) -> None:
    size = 50 * 2**20
    most: list[int] = []

    class Responder(Protocol):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.write(bytes(size))
            self.transport.close()

        def pause_writing(self) -> None:
            most.append(self.transport.get_write_buffer_size())

    loop = uvloop.new_event_loop()
    server_side, client_side = socket.socketpair()
    handshake = TlsHandshake(loop, make_context(files), Responder)
    loop.run_until_complete(loop.connect_accepted_socket(lambda: handshake, server_side))
    thread = threading.Thread(target=loop.run_until_complete, args=(handshake.complete,))
    thread.start()
    with authority.client_context().wrap_socket(client_side, server_hostname="localhost") as client:
        thread.join()
        client.sendall(b"a request")
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            read = 0
            while data := client.recv(1 << 20):
                assert not any(data)
                read += len(data)
            assert read == size
            assert most[0] > size - 2**20
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def test_a_lost_connection_keeps_nothing(pair: Pair) -> None:
    pair.tcp.room = 0
    pair.transport.write(os.urandom(10 * PIECE_BYTES))
    assert pair.transport.get_write_buffer_size() > 9 * PIECE_BYTES
    pair.tcp.room, pair.tcp.unread, pair.tcp.owner = 1 << 40, 0, None
    pair.transport.data_received(b"garbage" * 100)
    pair.transport.connection_lost(None)
    assert pair.told[-1] == "lost"
    assert pair.transport.get_write_buffer_size() == 0
    pair.transport.write(b"late")
    pair.transport.close()
    freed = weakref.ref(pair.records.object)
    gc.disable()
    try:
        pair.protocol.transport = None
        del pair.records, pair.transport
        assert freed() is None, "nothing waits for the garbage collector"
    finally:
        gc.enable()
