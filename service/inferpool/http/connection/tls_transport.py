"""Stands between the TCP transport of a TLS connection and the protocol of the connection.

For the protocol this is a transport, and for the TCP transport it is a protocol. asyncio and uvloop have such
a layer as well, which costs a small request as much as everything else that the server does for it.

A large response is encrypted piece by piece as the client reads: encrypted at once, it would be in memory
twice, and its client would seem to have read it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, Final

from inferpool.http.connection.tls_records import TlsRecords

PIECE_BYTES: Final = 64 * 1024
"""Bytes that are encrypted at a time."""
_BURST_BYTES: Final = 16 * PIECE_BYTES
"""Bytes of a response that are encrypted before other connections have their turn."""
MOST_UNREAD_BYTES: Final = 4 * PIECE_BYTES
"""Nothing is sent unasked, such as responses to key updates, to a client that leaves more bytes unread."""
SHUTDOWN_S: Final = 3.0
"""How long a client that has broken the protocol may take to read why the connection ends."""


class TlsTransport:
    """The transport of a connection whose handshake is complete.

    Has the methods of `asyncio.Transport` and of `asyncio.Protocol`, but not these classes as bases, because
    this module is compiled.

    Attributes:
        ended: whether the protocol knows that the client sends nothing more.
    """

    __slots__ = (
        "_is_blocked", "_is_buffered", "_is_closing", "_is_eof_owed", "_is_eof_sent", "_is_full",
        "_is_paused", "_is_scheduled", "_is_told", "_loop", "_protocol", "_records", "_transport", "_waiting",
        "_waiting_bytes", "ended",
    )  # fmt: skip

    def __init__(self, transport: Any, records: TlsRecords, protocol: Any, loop: Any) -> None:
        """`transport` is that of TCP."""
        self.ended = False
        self._transport = transport
        self._records = records
        self._protocol = protocol
        self._loop = loop
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._is_buffered = self._is_paused = self._is_closing = False
        self._is_full = self._is_told = self._is_blocked = self._is_scheduled = False
        self._is_eof_owed = self._is_eof_sent = False
        transport.set_write_buffer_limits(high=PIECE_BYTES // 2, low=0)

    def begin(self) -> None:
        """Give the protocol this transport, and what was received behind the handshake."""
        self._protocol.connection_made(self)
        self.deliver()

    # From the protocol of the connection: the methods of a transport.

    def write(self, data: Any) -> None:
        """Write `data` as soon as the client has read what was written before."""
        if self._is_closing or self._is_eof_owed:
            return
        if not self._is_full and not self._waiting and len(data) <= PIECE_BYTES:
            records = self.encrypt(data)
            if records:
                self._transport.write(records)
            return
        self._waiting.append(memoryview(data))
        self._waiting_bytes += len(data)
        self._pass_on()

    def encrypt(self, data: bytes) -> bytes:
        """Return the records that hold `data`, which the caller writes before anything else is written.

        Call only if `get_write_buffer_size` returns 0. What cannot be encrypted yet is written later.
        """
        try:
            taken = self._records.encrypt(data)
        except ssl.SSLError:
            self._fail()
            return b""
        records = self._records.output()
        if taken < len(data):
            self._is_blocked = True
            self._waiting.append(memoryview(data)[taken:])
            self._waiting_bytes += len(data) - taken
            self._tell()
        return records

    def write_records(self, records: bytes) -> None:
        """Write what `encrypt` has returned, or the rest of it."""
        if not self._is_closing:
            self._transport.write(records)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that are not with the kernel yet."""
        size: int = self._transport.get_write_buffer_size()
        return self._waiting_bytes + size

    def write_eof(self) -> None:
        """Announce, once everything is written, that nothing follows."""
        self._is_eof_owed = True
        if not self._waiting:
            self._end_writing()

    def can_write_eof(self) -> bool:
        """Return True: the client may still send."""
        return True

    def close(self) -> None:
        """End the connection once everything is written."""
        if self._is_closing:
            return
        self._is_closing = True
        if self._waiting:
            self._transport.pause_reading()
        else:
            self._end_writing()

    def abort(self) -> None:
        """End the connection at once."""
        self._is_closing = True
        self._forget()
        self._transport.abort()

    def is_closing(self) -> bool:
        """Return whether the connection ends."""
        return self._is_closing or bool(self._transport.is_closing())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known of the TLS connection or of its socket."""
        tls = self._records.object
        if name == "ssl_object":
            return tls
        if name == "sslcontext":
            return tls.context
        if name == "peercert":
            return tls.getpeercert()
        return self._transport.get_extra_info(name, default)

    def set_protocol(self, protocol: Any) -> None:
        """Give all that follows to `protocol`."""
        self._protocol = protocol
        self._is_buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def get_protocol(self) -> Any:
        """Return the protocol of the connection."""
        return self._protocol

    def is_reading(self) -> bool:
        """Return whether the protocol is given what is received."""
        return not self._is_paused and not self._is_closing

    def pause_reading(self) -> None:
        """Give the protocol nothing more until `resume_reading`."""
        self._is_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on with what is received, and with what was received before."""
        if not self._is_paused or self._is_closing:
            return
        self._is_paused = False
        if self.ended:
            return
        if self._records.ended or self._records.has_input():
            self._loop.call_soon(self.deliver)  # not at once: the protocol may be in the midst of a piece
        self._transport.resume_reading()

    # From the TCP transport: the methods of a protocol.

    def data_received(self, data: bytes) -> None:
        """Give the protocol the content of the records that `data` completes."""
        if not self.ended and not self._is_closing:
            self._records.feed(data)
            self.deliver()

    def eof_received(self) -> bool:
        """Tell the protocol that the client sends nothing more, whether it has announced that or not.

        A request that is complete is answered in both cases, because it has a length. A client that does not
        send all of a request gets no response, so nothing is gained by cutting a connection off.
        """
        if not self.ended and not self._is_closing:
            self._end_reading()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what is not written, and tell the protocol."""
        self._is_closing = True
        self._forget()
        protocol, self._protocol = self._protocol, None
        protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """Take note that the client does not read as fast as is written."""
        self._is_full = True
        self._tell()

    def resume_writing(self) -> None:
        """Take note that the kernel has taken everything."""
        self._is_full = False
        self._pass_on()

    # From the batched reads.

    def decrypt(self, data: bytes) -> bytes:
        """Return the content of the records that `data` completes, for the caller to give to the protocol.

        Nothing is returned if no record is complete, and if the connection has failed.
        """
        records = self._records
        try:
            records.feed(data)
            content = records.decrypt()
        except ssl.SSLError:
            self._fail()
            return b""
        self._send_unasked()
        return b"" if self._is_closing else content

    def has_ended(self) -> bool:
        """Return whether the client has announced that it sends nothing more."""
        return self._records.ended

    def deliver(self) -> None:
        """Give the protocol the content of all records that were received, and the end of the stream."""
        records = self._records
        while not self._is_paused and not self._is_closing and not self.ended:
            if not self._is_buffered:
                content = self.decrypt(b"")
                if content:
                    self._protocol.data_received(content)
                break
            memory = self._protocol.get_buffer(-1)
            try:
                size = records.decrypt_into(memory)
            except ssl.SSLError:
                self._fail()
                return
            self._send_unasked()
            if size and not self._is_closing:
                self._protocol.buffer_updated(size)
            if size < len(memory):
                break
        if records.ended and not self._is_paused and not self._is_closing and not self.ended:
            self._end_reading()

    def has_content(self) -> bool:
        """Return whether the protocol has not been given all that was received."""
        return self._records.has_content()

    # The steps.

    def _end_reading(self) -> None:
        """Tell the protocol that nothing follows, and keep the connection only as long as it wants."""
        self.ended = True
        if self._protocol.eof_received():
            self._transport.pause_reading()
        else:
            self.close()

    def _send_unasked(self) -> None:
        """Send what OpenSSL has written by itself, and go on with what waited for a message of the client."""
        if self._records.has_output():
            if self._transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
                self.abort()
                return
            self._transport.write(self._records.output())
        if self._is_blocked:
            self._is_blocked = False
            self._pass_on()

    def _tell(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._protocol.pause_writing()

    def _pass_on(self) -> None:
        """Encrypt and write what waits until the client reads no faster; then tell the protocol."""
        burst = 0
        while self._waiting and not self._is_full and not self._is_blocked:
            if burst >= _BURST_BYTES:
                if not self._is_scheduled:
                    self._is_scheduled = True
                    self._loop.call_soon(self._continue)
                break
            piece = self._waiting.popleft()
            if len(piece) > PIECE_BYTES:
                self._waiting.appendleft(piece[PIECE_BYTES:])
                piece = piece[:PIECE_BYTES]
            try:
                taken = self._records.encrypt(piece)
            except ssl.SSLError:
                self._fail()
                return
            self._waiting_bytes -= taken
            burst += taken
            if taken < len(piece):
                self._is_blocked = True
                self._waiting.appendleft(piece[taken:])
            self._transport.write(self._records.output())
        if self._waiting:
            self._tell()
            return
        if self._is_eof_owed or self._is_closing:
            self._end_writing()
        if self._is_told and not self._is_full:
            self._is_told = False
            if self._protocol is not None:
                self._protocol.resume_writing()

    def _continue(self) -> None:
        self._is_scheduled = False
        self._pass_on()

    def _end_writing(self) -> None:
        """Announce the end, and end the connection unless the client may still send."""
        if not self._is_eof_sent:
            self._is_eof_sent = True
            self._records.close()
            if records := self._records.output():
                self._transport.write(records)
            if not self._is_closing:
                self._transport.write_eof()
        if self._is_closing:
            self._transport.close()

    def _fail(self) -> None:
        """End the connection of a client that has broken the protocol, and say so by an alert."""
        if self._is_closing:
            return
        self._is_closing = self._is_eof_sent = True
        self._forget()
        alert = self._records.output()
        if alert:
            self._transport.write(alert)
        self._transport.close()
        self._loop.call_later(SHUTDOWN_S, self._transport.abort)

    def _forget(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0
