"""TLS connections of a real server: what clients may do with bytes, and the tests of plain connections.

All requests are read in batches.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.certificates import Authority
from tests.chaos import inferpool_chaos as chaos
from tests.conftest import MakeChaos, Serve
from tests.http.connection.test_batched_reads import mixed
from tests.http.connection.test_body_receiver import (
    test_a_large_body_waits_to_be_asked_for,
    test_a_large_compressed_body_is_read,
    test_a_large_invalid_body_is_refused_and_the_connection_stays_usable,
    test_requests_behind_a_large_body_are_answered_in_order,
)
from tests.http.connection.test_pipelining import (
    HANGS_S,
    LIVE,
    Wire,
    request,
    sums,
    test_pipelined_requests_are_answered_in_order,
    test_requests_that_ask_to_upgrade_have_their_turns_as_all_others,
)
from tests.http.connection.tls_client import TlsClient
from tests.server import Server

__all__ = [
    "test_a_large_body_waits_to_be_asked_for",
    "test_a_large_compressed_body_is_read",
    "test_a_large_invalid_body_is_refused_and_the_connection_stays_usable",
    "test_pipelined_requests_are_answered_in_order",
    "test_requests_behind_a_large_body_are_answered_in_order",
    "test_requests_that_ask_to_upgrade_have_their_turns_as_all_others",
]

LARGE_ROWS = 900_000
"""Rows of fourteen numbers of four bytes, each of which is answered by a number of eight."""
CLIENTS = 8


@pytest.fixture(scope="module")
def server_module() -> str:
    return "tests.servers.always_batched_reads"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(
    authority: Authority,
    module_serve: Serve,
    module_make_chaos: MakeChaos,
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    folder: Path = tmp_path_factory.mktemp("tls")
    authority.issue(folder / "tls.crt", folder / "tls.key")
    files = ("--tls-certificate-file", str(folder / "tls.crt"), "--tls-key-file", str(folder / "tls.key"))
    module_make_chaos("wide", f"[batching]\nmax_rows = {LARGE_ROWS}\n", row=[14])
    repository = module_make_chaos("m", "[queue]\nmax_rows = 1000000\n", run_ms=1)
    return module_serve(repository, *files, "--max-body-bytes", str(60 * 2**20), "--measure-ms", "0")


@pytest.fixture
def wire(server: Server, authority: Authority) -> Iterator[Wire]:
    with Wire(server, authority.client_context()) as made:
        yield made


class Bare:
    """A connection whose TLS client is in memory."""

    def __init__(
        self, server: Server, authority: Authority, cut: Callable[[bytes], list[bytes]] = lambda data: [data]
    ) -> None:
        """Shake hands; everything is sent in the pieces that `cut` makes of it."""
        self.client = TlsClient(authority.client_context())
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=HANGS_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._cut = cut
        self.send(self.client.shake_hands())
        while self.client.object.version() is None or self.client.object.cipher() is None:
            self.send(self.client.shake_hands(self.socket.recv(1 << 16)))

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        for piece in self._cut(data):
            self.socket.sendall(piece)

    def ask(self, text: str) -> None:
        self.send(self.client.encrypt(text.encode()))

    def answer(self, text: str) -> bytes:
        """Send a request, and return its response."""
        self.ask(text)
        contents = b""
        while not contents.endswith(b"}"):
            contents += self.client.decrypt(self.socket.recv(1 << 16))
        return contents

    def read(self) -> bytes:
        """Return everything until the server has announced its end, or the connection is closed."""
        contents = b""
        while not self.client.ended and (data := self.socket.recv(1 << 16)):
            contents += self.client.decrypt(data)
        return contents


def test_records_may_be_cut_into_single_bytes(server: Server, authority: Authority) -> None:
    with Bare(server, authority, lambda data: [bytes([byte]) for byte in data]) as bare:
        for mark in range(3):
            bare.ask(request(mark))
        bare.ask(LIVE.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n"))
        answers = bare.read()
    assert answers.count(b"HTTP/1.1 200") == 4
    assert bare.client.ended, "the end is announced"


def test_many_requests_may_be_in_one_record(server: Server, authority: Authority) -> None:
    with Bare(server, authority) as bare:
        texts = [request(mark) for mark in range(60)]
        texts.append(request(60, headers="connection: close\r\n"))
        bare.ask("".join(texts))
        answers = bare.read()
    bodies = [json.loads(text.partition(b"\r\n\r\n")[2]) for text in answers.split(b"HTTP/1.1 200")[1:]]
    assert [body["outputs"]["sum"] for body in bodies] == [sums(mark) for mark in range(61)]


@pytest.mark.parametrize("shuts", [False, True])
def test_a_client_that_announces_its_end_is_answered(
    server: Server, authority: Authority, shuts: bool
) -> None:
    for warm_up in (0, 2):  # a first request, and one that is read in a batch
        with Bare(server, authority) as bare:
            for mark in range(warm_up):
                assert b"200 OK" in bare.answer(request(mark))
            bare.send(bare.client.encrypt(request(7).encode()) + bare.client.close())
            if shuts:
                bare.socket.shutdown(socket.SHUT_WR)
            answer = bare.read()
            assert json.loads(answer[answer.rindex(b"\r\n\r\n") :])["outputs"]["sum"] == sums(7)
            assert bare.client.ended
            assert bare.socket.recv(1) == b""


def test_a_body_that_is_cut_off_is_no_request(server: Server, authority: Authority) -> None:
    """Anybody between client and server can end the TCP connection, but not announce an end."""
    before = server.metric("requests_total", model="m", code="ok")
    for announced in (True, False):
        with Bare(server, authority) as bare:
            text = request(*range(50))
            bare.ask(text[:-20])
            if announced:
                bare.send(bare.client.close())
            bare.socket.shutdown(socket.SHUT_WR)
            assert bare.read() == b""
    assert server.metric("requests_total", model="m", code="ok") == before


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x17\x03\x03\x00\x20" + bytes(32)])
def test_garbage_ends_only_its_own_connection(
    server: Server, authority: Authority, wire: Wire, garbage: bytes
) -> None:
    with Bare(server, authority) as bare:
        for _ in range(2):
            assert b"200 OK" in bare.answer(request(1))
        bare.socket.sendall(garbage)
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            bare.read()
    wire.send(request(5))
    assert wire.answer()[0] == 200


def test_nothing_but_alerts_comes_before_the_handshake(server: Server) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)
    for text in (request(1).encode(), b"\x17\x03\x03\x00\x05hello", hello + request(1).encode() * 20):
        with Wire(server) as bare:
            bare.send(text)
            bare.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                answer = bare.stream.read()
                assert answer[:1] == b"\x15" or b"ask for https://" in answer, answer
                assert b"200 OK" not in answer


def test_keys_are_updated_and_renegotiation_is_refused(server: Server, authority: Authority) -> None:
    """By the client of OpenSSL: K updates the keys of both sides, R asks to renegotiate."""
    for version, command, said in (("-tls1_3", "K", "KEYUPDATE"), ("-tls1_2", "R", "no renegotiation")):
        client = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"localhost:{server.port}", version],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert client.stdin is not None
        assert client.stdout is not None
        with client:
            for line in client.stdout:
                if b"Verify return code" in line:
                    break
            for _ in range(3 if command == "K" else 1):
                client.stdin.write(command.encode() + b"\n")
                client.stdin.flush()
                for line in client.stdout:
                    if said.encode() in line:
                        break
                if command == "K":
                    client.stdin.write(request(3, headers="x-last: no\r\n").encode())
                    client.stdin.flush()
                    for line in client.stdout:
                        if b"HTTP/1.1 200" in line:
                            break
                    for line in client.stdout:
                        if line == b"\r\n":
                            break
            client.stdin.close()
            said_last = client.stdout.read()
        if command == "K":
            assert str(sums(3)[0]).encode() in said_last


def test_large_bodies_and_slow_readers_hold_nobody(server: Server, authority: Authority, wire: Wire) -> None:
    values = np.arange(14 * LARGE_ROWS, dtype=np.float32).reshape(-1, 14) % 1024
    buffer = io.BytesIO()
    np.save(buffer, values)
    sent = buffer.getvalue()
    assert len(sent) > 50e6
    head = (
        "POST /predict/wide HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-npy\r\n"
        f"accept: application/x-npy\r\ncontent-length: {len(sent)}\r\n\r\n"
    )
    with Wire(server, authority.client_context()) as slow:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        slow.send(head)
        slow.send(sent)
        for mark in range(20):
            wire.send(request(mark))
            assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(mark)
        status, headers, body = slow.answer()
        assert (status, len(body)) == (200, int(headers["content-length"]))
        assert np.array_equal(np.load(io.BytesIO(body)), chaos.expected(values))
        slow.send(request(9))
        assert json.loads(slow.answer()[2])["outputs"]["sum"] == sums(9)


def test_clients_that_mix_requests_get_their_own_responses(server: Server, authority: Authority) -> None:
    faults: list[BaseException] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(2):
                with Wire(server, authority.client_context()) as wire:
                    for _ in range(25):
                        mixed(wire, rng)
                    if rng.random() < 0.5:
                        wire.send(request(1))
                        linger = struct.pack("ii", 1, 0)  # reset the connection
                        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not faults
    assert not any(thread.is_alive() for thread in threads)
    assert not [line for line in server.log if line["level"] in ("error", "raw")]
