"""Cuts the data that arrives on a channel's socket into complete records, for both ends."""

from __future__ import annotations

import socket
from typing import Final

from inferpool.engine.records import HEAD, HEAD_BYTES, MOST_BYTES, ProtocolError, check_length

_BUFFER_BYTES: Final = 256 * 1024

CLOSED: Final = 0
"""What `Incoming.receive` returns if the other side has closed the socket."""
NOTHING: Final = -1
"""What `Incoming.receive` returns if nothing has arrived."""


class Incoming:
    """Bytes that have arrived on a socket, from `start` to `stop` in `buffer`.

    The owner reads complete records, and moves `start` behind them.
    """

    __slots__ = ("_view", "buffer", "start", "stop")

    def __init__(self) -> None:
        self.buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self.buffer)
        self.start = 0
        self.stop = 0

    def receive(self, source: socket.socket) -> int:
        """Add what has arrived; returns the number of bytes, `CLOSED` or `NOTHING`."""
        try:
            count = source.recv_into(self._view[self.stop :])
        except (BlockingIOError, InterruptedError):
            return NOTHING
        except OSError:
            return CLOSED
        self.stop += count
        return count

    def make_room(self, length: int) -> None:
        """Move the incomplete record at `start` to the front; it will have `length` bytes, or fewer.

        Raises ProtocolError if no record is so long.
        """
        if length > MOST_BYTES:
            raise ProtocolError(f"a record of {length} bytes came; the longest has {MOST_BYTES}")
        kept = self.stop - self.start
        if self.start:
            self._view[:kept] = bytes(self._view[self.start : self.stop])
            self.start, self.stop = 0, kept
        size = len(self.buffer)
        if length > size or (size > _BUFFER_BYTES and max(kept, length) <= _BUFFER_BYTES):
            larger = bytearray(max(_BUFFER_BYTES, length))
            larger[:kept] = self._view[:kept]
            self.buffer = larger
            self._view = memoryview(larger)


class RecordReader:
    """Reads complete records from what has arrived. Subclasses take them.

    Attributes:
        incoming: what has arrived.
    """

    __slots__ = ("incoming",)

    def __init__(self) -> None:
        self.incoming = Incoming()

    def read_records(self) -> None:
        """Take all complete records; raises ProtocolError for what is no record."""
        incoming = self.incoming
        buffer = incoming.buffer
        at = incoming.start
        stop = incoming.stop
        length = 0
        while stop - at >= HEAD_BYTES:
            length, kind = HEAD.unpack_from(buffer, at)
            check_length(length)
            if stop - at < length:
                break
            self.take_record(kind, at, length)
            at += length
            length = 0
        if at == stop:
            incoming.start = incoming.stop = 0
        else:
            incoming.start = at
            incoming.make_room(length)

    def take_record(self, kind: int, at: int, length: int) -> None:
        """Take the record of `length` bytes at `at` in the buffer; raises ProtocolError if it is none."""
        raise NotImplementedError
