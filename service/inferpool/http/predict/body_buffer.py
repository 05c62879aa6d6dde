"""Assembles the body of a request in memory in which its tensors can stay."""

from __future__ import annotations

import mmap
from typing import Final

import numpy as np

from inferpool.errors import BodyTooLarge
from inferpool.http.predict.api import Data
from inferpool.http.predict.request_head import RequestHead

_ALIGNMENT: Final = 64
_COPIED_BYTES: Final = 256 * 1024
"""A body of unknown length up to this size is copied at once."""
"""Bytes of a cache line; more than any element needs."""


class BodyBuffer:
    """Collects one body; copies each of its bytes at most once, and to where an engine reads it if possible.

    Binary tensors follow a JSON header of any length. A runtime that requires aligned elements would have to
    copy unaligned ones again, so the body of such a request is assembled in memory that aligns its tensors.
    Together with the batch's `gather` there are two copies between the web server and the model, and one if
    an entry is alone in its batch, because then its tensors are the batch. If the model is in another
    process, the client of its engine lends the memory, and no further copy is made.
    """

    __slots__ = (
        "_chunks", "_growing", "_heap_bytes", "_json_length", "_length", "_lent", "_max_bytes", "_memory",
        "_size",
    )  # fmt: skip

    def __init__(
        self, head: RequestHead, max_bytes: int, heap_bytes: int, lent: memoryview | None = None
    ) -> None:
        """Prepare for the body of `head`, of at most `max_bytes`.

        The memory of a body of more than `heap_bytes` is not taken from the heap. `lent` is memory for the
        whole body, whose length is known.
        """
        self._max_bytes = max_bytes
        self._heap_bytes = heap_bytes
        self._size = 0
        self._chunks: list[bytes] = []
        self._growing: bytearray | None = bytearray() if head.content_length is None else None
        self._memory = lent
        self._lent = lent is not None
        length, json_length = head.content_length or 0, head.header_length or 0
        self._length = length
        # A compressed body holds no tensors that could be aligned.
        self._json_length = json_length if 0 < json_length <= length and not head.content_encoding else 0
        if self._json_length and length <= max_bytes and lent is None:
            self._memory = _aligned(length, json_length, heap_bytes)

    def add(self, chunk: bytes) -> None:
        """Take the next chunk; raises BodyTooLarge as soon as there are more bytes than allowed."""
        start = self._size
        self.advance(len(chunk))
        if self._growing is not None:
            # The client chooses the size of its chunks. Kept apart, a chunk of 1 byte would take 50 bytes.
            self._growing += chunk
        elif self._memory is None or (not self._lent and not start and self._size == len(self._memory)):
            self._chunks.append(chunk)
        else:
            self._memory[start : self._size] = chunk

    def remaining(self) -> memoryview:
        """Return memory for all bytes that are still to come of a body of known length.

        The caller writes them there in order, counts them with `advance`, and never calls `add` again.
        """
        if self._memory is None:
            self._memory = _aligned(self._length, self._json_length, self._heap_bytes)
            self._memory[: self._size] = b"".join(self._chunks)
            self._chunks.clear()
        return self._memory[self._size :]

    def advance(self, size: int) -> None:
        """Count `size` more bytes; raises BodyTooLarge as soon as there are more bytes than allowed."""
        self._size += size
        if self._size > self._max_bytes:
            raise too_large(self._max_bytes)

    def finish(self) -> Data:
        """Return the body, once it is complete."""
        if self._growing is not None:
            # A large copy would hold the GIL; whoever needs bytes copies them in pieces.
            return bytes(self._growing) if self._size <= _COPIED_BYTES else memoryview(self._growing)
        if self._chunks:
            return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        return b"" if self._memory is None else self._memory


def too_large(max_bytes: int) -> BodyTooLarge:
    """Return the error for a body of more than `max_bytes`."""
    return BodyTooLarge(
        f"the body is larger than {max_bytes} bytes, the limit; send fewer rows at a time", limit=max_bytes
    )


def _aligned(length: int, start: int, heap_bytes: int) -> memoryview:
    """Return `length` bytes of memory in which byte `start` has an aligned address.

    A client that announces a body and sends little of it takes addresses, not memory. On the heap these
    addresses would count as data of the process, whose limit would fail the requests of others. Shared pages
    are no data, but the kernel has to clear each of them.
    """
    if length > heap_bytes:
        try:
            pages = mmap.mmap(-1, length + _ALIGNMENT)
        except OSError as error:
            raise MemoryError(f"the system maps no {length} bytes for a body") from error
        memory = np.frombuffer(pages, np.uint8)
    else:
        memory = np.empty(length + _ALIGNMENT, np.uint8)
    offset = -(memory.ctypes.data + start) % _ALIGNMENT
    return memory[offset : offset + length].data
