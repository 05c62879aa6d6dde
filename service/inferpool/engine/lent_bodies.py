"""Blocks of an arena in which large bodies are received, so that their tensors are where the engine reads.

A block belongs to the body until an entry takes it over. The memory is an array that views the arena: each
view of the body, and the entry, keep this array alive. A block is free when nothing refers to its array any
more, so no part of the web process can read or write a block that is used for another request.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from typing import Any, Final

import numpy as np

from inferpool.engine.arena import ALIGNMENT, ARENA_PARTS, HEADER_BYTES, Arena
from inferpool.engine.event_loop import Loop
from inferpool.engine.tensor_layouts import Layout
from inferpool.errors import Overloaded
from inferpool.tensors import Tensors

LEAST_LENT_BYTES: Final = 64 * 1024
"""A smaller body is copied into its block: that costs less than a block of its own."""


class LentBody:
    """A block that is lent to a body.

    Attributes:
        offset: where the block is in the arena.
        nbytes: for how many bytes it was allocated.
        taken: whether an entry has taken it over.
        alive: tells when nothing refers to the array of the block any more.
    """

    __slots__ = ("alive", "nbytes", "offset", "taken")

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.taken = False
        self.alive: Any = None


class LentBodies:
    """The blocks of one arena that are lent. For the event loop, but for the end of arrays."""

    __slots__ = ("_address", "_arena", "_bytes", "_collect_planned", "_ended", "_lent", "_loop")

    def __init__(self, arena: Arena, loop: Loop) -> None:
        self._arena = arena
        self._loop = loop
        whole: Any = np.frombuffer(arena.map, np.uint8)
        self._address: int = whole.ctypes.data
        # By the offset, which no other block has until this one is collected.
        self._lent: dict[int, LentBody] = {}
        self._bytes = 0
        # A thread that decodes a body may drop the last reference.
        self._ended: deque[int] = deque()
        self._collect_planned = False

    def lend(self, nbytes: int, tensors_at: int) -> memoryview | None:
        """Return memory for a body of `nbytes` bytes, whose byte `tensors_at` is aligned; None without room.

        The memory before the tensors has room for the header of a block.
        """
        self.collect()
        arena = self._arena
        begin = HEADER_BYTES + -tensors_at % ALIGNMENT
        size = arena.block_size(max(LEAST_LENT_BYTES + 1, begin + nbytes + ALIGNMENT))
        if ARENA_PARTS * (self._bytes + size) > arena.size:
            return None  # clients may announce bodies, and never send them
        try:
            offset = arena.allocate(size)
        except Overloaded:
            return None
        self._bytes += size
        array: Any = np.ndarray(size, np.uint8, arena.map, offset)
        lent = LentBody(offset, size)
        self._lent[offset] = lent
        lent.alive = weakref.ref(array, lambda _: self._end(offset))
        memory: memoryview = array.data
        return memory[begin : begin + nbytes]

    def collect(self) -> None:
        """Free the blocks to which nothing refers any more."""
        self._collect_planned = False
        while self._ended:
            lent = self._lent.pop(self._ended.popleft())
            self._bytes -= lent.nbytes
            self._arena.free(lent.offset, lent.nbytes)

    def has(self, tensor: Any) -> bool:
        """Whether a tensor lies in a block that is lent."""
        return bool(self._lent) and _owner_of(tensor).ctypes.data - self._address in self._lent

    def take(self, layout: Layout, tensors: Tensors, rows: int) -> tuple[object, int, int] | None:
        """Take over the block in which tensors of a plain layout are, if they lie there as `write` puts them.

        Returns the array that keeps the block, the offset in the arena from which on it can be the block of
        an entry, and the bytes from there on; None if the tensors have to be copied.
        """
        if not self._lent:
            return None
        first: Any = None
        end = 0
        found: LentBody | None = None
        array: Any = None
        start = at = 0
        for form in layout.forms:
            tensor: Any = tensors[form.name]
            nbytes = form.nbytes * rows if form.by_rows else form.nbytes
            position = tensor.ctypes.data - self._address
            if first is None:
                first = tensor
                array = _owner_of(tensor)
                found = self._lent.get(array.ctypes.data - self._address)
                if found is None or found.taken or found.alive() is not array:
                    return None
                start = at = position
                end = found.offset + found.nbytes
                if at & (ALIGNMENT - 1) or at - HEADER_BYTES < found.offset:
                    return None
            if position != at or tensor.dtype != form.dtype or not tensor.flags.c_contiguous:
                return None
            at = (at + nbytes + (ALIGNMENT - 1)) & -ALIGNMENT
            if at > end:
                return None
        if found is None:
            return None
        found.taken = True
        return array, start - HEADER_BYTES, end - start + HEADER_BYTES

    def _end(self, offset: int) -> None:
        """Take note, in any thread, that nothing refers to the array of a block any more."""
        self._ended.append(offset)
        if not self._collect_planned:
            self._collect_planned = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self.collect)


def _owner_of(tensor: Any) -> Any:
    """The array whose memory a tensor views, through all other arrays and views in between."""
    while True:
        base = tensor.base
        if isinstance(base, memoryview):
            base = base.obj
        if not isinstance(base, np.ndarray):
            return tensor
        tensor = base
