"""The body of a request as it comes in, put together where its tensors can stay."""

from __future__ import annotations

from typing import Final

import numpy as np

from inferpool.errors import BodyTooLarge
from inferpool.http.predict.api import Data
from inferpool.http.predict.request_head import RequestHead

_ALIGNMENT: Final = 64
"""A cache line, and more than any element needs."""


class BodyBuffer:
    """Takes the chunks of one body; at most one copy of each of its bytes is made here.

    Binary tensors stand behind a JSON header of any length, where a runtime that is promised aligned
    elements would need them copied once more. So the body of such a request is put together in memory that
    is laid out for them. Together with the batch's `gather` that makes two copies between the web server
    and the model; one where an entry is alone in its batch, for then its tensors are the batch.
    """

    __slots__ = ("_buffer", "_chunks", "_growing", "_json_length", "_length", "_max_bytes", "_size")

    def __init__(self, head: RequestHead, max_bytes: int) -> None:
        """Prepare for the body of `head`, of which at most `max_bytes` are taken."""
        self._max_bytes = max_bytes
        self._size = 0
        self._chunks: list[bytes] = []
        self._growing: bytearray | None = bytearray() if head.content_length is None else None
        self._buffer: memoryview | None = None
        length, json_length = head.content_length or 0, head.header_length or 0
        self._length = length
        # Compressed, nothing has a place in it that would have to be aligned.
        self._json_length = json_length if 0 < json_length <= length and not head.content_encoding else 0
        if self._json_length and length <= max_bytes:
            self._buffer = _aligned(length, json_length)

    def add(self, chunk: bytes) -> None:
        """Take the next chunk; raises BodyTooLarge as soon as there are too many."""
        start, self._size = self._size, self._size + len(chunk)
        if self._size > self._max_bytes:
            raise too_large(self._max_bytes)
        if self._growing is not None:
            # Chunks of the sender's choosing may be of a byte each: kept apart they would take fifty.
            self._growing += chunk
        elif self._buffer is None or (not start and self._size == len(self._buffer)):
            self._chunks.append(chunk)
        else:
            self._buffer[start : self._size] = chunk

    def rest(self) -> memoryview:
        """Where all that is still to come of a body of known length is to lie; say what has by `came`.

        Nothing may be added any more.
        """
        if self._buffer is None:
            self._buffer = _aligned(self._length, self._json_length)
            self._buffer[: self._size] = b"".join(self._chunks)
            self._chunks.clear()
        return self._buffer[self._size :]

    def came(self, size: int) -> None:
        """`size` bytes more lie where `rest` said."""
        self._size += size

    def whole(self) -> Data:
        """The body, once all of it is there."""
        if self._growing is not None:
            return bytes(self._growing)
        if self._chunks:
            return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        return b"" if self._buffer is None else self._buffer


def too_large(max_bytes: int) -> BodyTooLarge:
    """The error for a body of more than `max_bytes`."""
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes", limit=max_bytes)


def _aligned(length: int, start: int) -> memoryview:
    """`length` bytes of memory whose byte `start` has an aligned address."""
    memory = np.empty(length + _ALIGNMENT, np.uint8)
    offset = -(memory.ctypes.data + start) % _ALIGNMENT
    return memory[offset : offset + length].data
