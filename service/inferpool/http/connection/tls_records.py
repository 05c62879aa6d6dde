"""Encrypts and decrypts the bytes of one TLS connection in memory; knows no socket and no event loop.

OpenSSL reads the records of the client from one buffer and writes its own to another. What OpenSSL writes
without being asked, such as alerts, session tickets and responses to key updates, is in `output` as well.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Any, Final

RECORD_BYTES: Final = 16 * 1024
"""The longest content of a record."""
_MORE_THAN_A_RECORD: Final = RECORD_BYTES + 1
"""OpenSSL gives one record at a time. A read for more bytes never leaves a part of the record behind."""


class TlsRecords:
    """The server's side of a TLS connection.

    Attributes:
        object: OpenSSL's state of the connection.
        ended: whether the client has announced that it sends nothing more (`close_notify`).
    """

    __slots__ = ("_holds_part", "_incoming", "_outgoing", "ended", "object")

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.ended = False
        self._holds_part = True  # whether OpenSSL may hold a part of a record, encrypted or decrypted

    def feed(self, data: bytes) -> None:
        """Take bytes that were received. Bytes behind the client's `close_notify` mean nothing."""
        if not self.ended:
            self._incoming.write(data)

    def shake_hands(self) -> bool:
        """Go on with the handshake, and return whether it is complete. Raises ssl.SSLError if it fails."""
        try:
            self.object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def has_input(self) -> bool:
        """Return whether there may be more to decrypt."""
        return not self.ended and (self._holds_part or self._incoming.pending > 0)

    def has_content(self) -> bool:
        """Return whether records, or the end of the stream, were received and not returned yet."""
        return self.ended or self._incoming.pending > 0 or self.object.pending() > 0

    def decrypt(self) -> bytes:
        """Return the content of all complete records. Raises ssl.SSLError if the client breaks TLS."""
        incoming = self._incoming
        data = self._read()
        if not data or not incoming.pending:
            return data
        contents = [data]
        while incoming.pending and (data := self._read()):
            contents.append(data)
        return b"".join(contents)

    def decrypt_into(self, memory: memoryview) -> int:
        """Write the content of complete records to `memory` until it is full, and return the bytes written.

        Raises ssl.SSLError if the client breaks TLS.
        """
        # Not typed: the standard library says that `read` returns bytes, and compiled code checks types.
        tls: Any = self.object
        size, filled = len(memory), 0
        while filled < size and self.has_input():
            most = min(size - filled, _MORE_THAN_A_RECORD)
            try:
                count: int = tls.read(most, memory[filled:])
            except ssl.SSLWantReadError:
                self._holds_part = True
                break
            except ssl.SSLZeroReturnError:
                count = 0
            if count == 0:
                self.ended = True
                break
            self._holds_part = count == most
            filled += count
        return filled

    def encrypt(self, data: bytes | memoryview) -> int:
        """Add `data` to the output, and return how many bytes of it were taken.

        OpenSSL takes fewer while a message that belongs to no content, such as a key update, was received
        only in part. Raises ssl.SSLError after a failure.
        """
        size = len(data)
        if not size:
            return 0
        tls, taken = self.object, 0
        try:
            taken = tls.write(data)
            if taken < size:  # OpenSSL takes the content of one record at a time
                rest = memoryview(data)
                while taken < size:
                    taken += tls.write(rest[taken : taken + RECORD_BYTES])
        except ssl.SSLWantReadError:
            pass
        return taken

    def has_output(self) -> bool:
        """Return whether OpenSSL has something to send."""
        return self._outgoing.pending > 0

    def output(self) -> bytes:
        """Return the records that are to be sent."""
        return self._outgoing.read()

    def close(self) -> None:
        """Announce that nothing more is sent (`close_notify`)."""
        # The client has not announced its own end, or the connection has failed before.
        with contextlib.suppress(ssl.SSLError):
            self.object.unwrap()

    def _read(self) -> bytes:
        """Return the content of the next record, or nothing if it is not complete, or if there is none."""
        size = self._incoming.pending
        if self._holds_part or size > _MORE_THAN_A_RECORD:
            size = _MORE_THAN_A_RECORD
        if not size or self.ended:
            return b""
        try:
            data = self.object.read(size)
        except ssl.SSLWantReadError:
            self._holds_part = True
            return b""
        except ssl.SSLZeroReturnError:
            data = b""
        self._holds_part = False
        if not data:
            self.ended = True
        return data
