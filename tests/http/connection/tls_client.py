"""A TLS client in memory, whose bytes a test may cut, hold back or forge."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

CLOSE_NOTIFY = b"\x01\x00"
UPDATE_REQUESTED = b"\x18\x00\x00\x01\x01"
"""The message that one side has new keys and wants the other to take new ones (RFC 8446, 4.6.3)."""
ALERT, HANDSHAKE, CONTENT = 21, 22, 23


class TlsClient:
    """OpenSSL's side of a client, between two buffers.

    Attributes:
        ended: whether the server has announced that it sends nothing more.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.ended = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def shake_hands(self, received: bytes = b"") -> bytes:
        """Take what was received, and return what is to be sent."""
        self._incoming.write(received)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.object.do_handshake()
        return self._outgoing.read()

    def encrypt(self, data: bytes) -> bytes:
        """Return records with `data`."""
        self.object.write(data)
        return self._outgoing.read()

    def close(self) -> bytes:
        """Return the announcement that nothing more is sent."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.object.unwrap()
        return self._outgoing.read()

    def decrypt(self, received: bytes) -> bytes:
        """Return the content of what was received."""
        self._incoming.write(received)
        contents = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while True:
                try:
                    content = self.object.read(1 << 16)
                except ssl.SSLZeroReturnError:
                    content = b""
                if not content:
                    self.ended = True
                    break
                contents += content
        return contents


class RecordForger:
    """Writes records of TLS 1.3 with the keys of a client that has sent nothing since its handshake."""

    def __init__(self, client: TlsClient, key_log: Path) -> None:
        """`key_log` is the `keylog_filename` of the client's context."""
        assert client.object.cipher() == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
        [line] = [text for text in key_log.read_text().splitlines() if "CLIENT_TRAFFIC_SECRET_0" in text]
        self._secret = bytes.fromhex(line.split()[-1])
        self._take_keys()

    def record(self, content: bytes, kind: int = CONTENT) -> bytes:
        """Return one record."""
        nonce = (int.from_bytes(self._iv, "big") ^ self._number).to_bytes(12, "big")
        self._number += 1
        header = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2, "big")
        return header + AESGCM(self._key).encrypt(nonce, content + bytes([kind]), header)

    def update_keys(self) -> None:
        """Use the next keys, as a client does behind its message of the update."""
        self._secret = self._expand(b"traffic upd", 48)
        self._take_keys()

    def _take_keys(self) -> None:
        self._key, self._iv, self._number = self._expand(b"key", 32), self._expand(b"iv", 12), 0

    def _expand(self, label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\x00"
        return HKDFExpand(hashes.SHA384(), size, info).derive(self._secret)
