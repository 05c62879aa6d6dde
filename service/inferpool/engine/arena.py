"""Shared memory for the tensors of requests: an arena of blocks, mapped by a web process and an engine.

The web process allocates and frees every block. The engine only reads inputs from a block, and writes outputs
into the part of the block that is kept for them. The memory is a memfd: it has no name, so nothing is left
behind when processes die, and its pages count in the memory of the container.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from bisect import bisect_left
from typing import Final

from inferpool.engine.event_loop import Loop
from inferpool.errors import Overloaded

ALIGNMENT: Final = 64
"""Blocks, and the tensors in blocks, begin at multiples of so many bytes."""
HEADER_BYTES: Final = 64
"""A block begins with so many bytes that are no tensor. The first byte tells whether a run has begun."""

ARENA_PARTS: Final = 3
"""An arena has room for inputs, for outputs, and for bodies that are still received: so many equal parts."""

_PAGE: Final = 4096
_SLAB: Final = 256 * 1024
"""Small blocks of one size are cut from slabs of so many bytes."""
_LARGEST_SMALL: Final = 64 * 1024
"""Larger blocks are whole pages of their own."""
_MOST_UNUSED: Final = 16 * 1024 * 1024
"""So many bytes of freed pages stay in memory without an end, because writing to new pages is slow."""
_AGE_S: Final = 2.0
"""Freed pages beyond that stay if so many were in use within so many seconds."""
_MOST_SHARE: Final = 4 * ARENA_PARTS
"""But never more than this part of an arena, a quarter of what requests may have in flight: other memory has
to find room beside them."""
_MOST_AT_ONCE: Final = 64 * 1024 * 1024
_SOON_S: Final = 0.02
"""So many bytes go back to the system at once, and more after so many seconds: requests go on in between."""
_SEALS: Final = 0x0001 | 0x0002 | 0x0004
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW: no process can cut memory off that another has mapped."""
_ADD_SEALS: Final = 1033
_MADV_REMOVE: Final = 9


def make_arena(nbytes: int) -> int:
    """Return the descriptor of a new arena of at least `nbytes` bytes, which no process can resize.

    Raises OSError if the system has no memory or descriptors for the arena.
    """
    size = max(_SLAB, -(-nbytes // _SLAB) * _SLAB)
    descriptor = os.memfd_create("inferpool-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, _ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class ArenaView:
    """An arena as the engine sees it: memory with checked places.

    Attributes:
        size: bytes of the arena.
        map: the mapped memory. Arrays that view it keep it mapped.
        memory: the same memory, for single bytes.
    """

    __slots__ = ("map", "memory", "size")

    def __init__(self, descriptor: int) -> None:
        """Map the arena of `descriptor`, which may be closed afterwards. Raises OSError or ValueError."""
        self.size = os.fstat(descriptor).st_size
        self.map = mmap.mmap(descriptor, self.size)
        self.memory = memoryview(self.map)

    def has_block(self, offset: int, size: int) -> bool:
        """Whether a block of `size` bytes can be at `offset`."""
        return (
            not offset & (ALIGNMENT - 1)
            and offset >= 0
            and size >= HEADER_BYTES
            and offset + size <= self.size
        )


class Arena:
    """An arena as the web process sees it, which owns the blocks. For one thread.

    Blocks up to 64 KiB come from lists of free blocks by size. Larger blocks are runs of pages. Pages that
    were freed stay in memory, and are used again first; those that are not needed any more go back to the
    system.

    Attributes:
        size: bytes of the arena.
        map: the mapped memory.
        memory: the same memory, for single bytes.
        used: bytes of all blocks that are allocated.
        unused: bytes of free pages that are still in memory.
    """

    __slots__ = (
        "_ages", "_class_of", "_free_blocks", "_freed_pages", "_leaving", "_loop", "_most", "_new_pages",
        "_peak", "_sizes", "_slab_blocks", "_slab_class", "map", "memory", "size", "unused", "used",
    )  # fmt: skip

    def __init__(self, descriptor: int, loop: Loop | None = None) -> None:
        """Map the arena of `descriptor`, which may be closed afterwards. Raises OSError or ValueError.

        Without a loop nothing tells when freed pages are not needed any more, and they stay.
        """
        self.size = os.fstat(descriptor).st_size
        self.map = mmap.mmap(descriptor, self.size)
        self.memory = memoryview(self.map)
        self.used = 0
        self._sizes = _small_sizes()
        # By the number of times that ALIGNMENT fits into a size, rounded up: the index of the smallest size.
        self._class_of = [
            bisect_left(self._sizes, units * ALIGNMENT) for units in range(_LARGEST_SMALL // ALIGNMENT + 1)
        ]
        self._free_blocks: list[list[int]] = [[] for _ in self._sizes]
        slabs = self.size // _SLAB + 1
        # By slab: the index of the size of its blocks, or -1; and how many of its blocks are allocated.
        self._slab_class = [-1] * slabs
        self._slab_blocks = [0] * slabs
        # The runs of free pages by offset, sorted: [offset, bytes]. No two of one list touch. Those that were
        # freed are in memory, the new ones are not.
        self._freed_pages: list[tuple[int, int]] = []
        self._new_pages: list[tuple[int, int]] = [(0, self.size)] if self.size else []
        self.unused = 0
        self._most = max(_MOST_UNUSED, self.size // _MOST_SHARE)
        # The most bytes that were in use since `_age` has looked, the bytes it has yet to give back, and
        # whether the loop will call it.
        self._peak = 0
        self._leaving = 0
        self._ages = False
        self._loop = loop

    def allocate(self, nbytes: int) -> int:
        """Return the offset of a new block of at least `nbytes` bytes; raises Overloaded if none fits."""
        if nbytes > _LARGEST_SMALL:
            size = -(-nbytes // _PAGE) * _PAGE
            offset = self._take_pages(size, _PAGE)
            self.used += size
            if self.used > self._peak:
                self._peak = self.used
            return offset
        index = self._class_of[(nbytes + (ALIGNMENT - 1)) // ALIGNMENT]
        free = self._free_blocks[index]
        if not free:
            self._cut_slab(index)
        offset = free.pop()
        self._slab_blocks[offset // _SLAB] += 1
        self.used += self._sizes[index]
        return offset

    def block_size(self, nbytes: int) -> int:
        """Return how many bytes a block has that was allocated for `nbytes` bytes."""
        if nbytes > _LARGEST_SMALL:
            return -(-nbytes // _PAGE) * _PAGE
        return self._sizes[self._class_of[(nbytes + (ALIGNMENT - 1)) // ALIGNMENT]]

    def free(self, offset: int, nbytes: int) -> None:
        """Free the block at `offset` that was allocated for `nbytes` bytes."""
        if nbytes > _LARGEST_SMALL:
            size = -(-nbytes // _PAGE) * _PAGE
            self.used -= size
            self._free_pages(offset, size)
            return
        index = self._class_of[(nbytes + (ALIGNMENT - 1)) // ALIGNMENT]
        self._free_blocks[index].append(offset)
        self._slab_blocks[offset // _SLAB] -= 1
        self.used -= self._sizes[index]

    def trim(self) -> None:
        """Give the memory of everything that is free back to the system."""
        self._reclaim_slabs()
        self._give_back(self.unused)

    def _age(self) -> None:
        """Give back free pages that were not needed since the last look, in parts, until few are left."""
        if not self._leaving:
            self._leaving = max(0, self.unused - _MOST_UNUSED - (self._peak - self.used))
            self._peak = self.used
        given = self._give_back(min(self._leaving, _MOST_AT_ONCE))
        self._leaving = max(0, self._leaving - given) if given else 0
        self._ages = False
        self._plan(_SOON_S if self._leaving else _AGE_S)

    def _plan(self, delay_s: float) -> None:
        if self._loop is not None and self.unused > _MOST_UNUSED:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_later(delay_s, self._age)
                self._ages = True

    def _cut_slab(self, index: int) -> None:
        start = self._take_pages(_SLAB, _SLAB)
        self._slab_class[start // _SLAB] = index
        size = self._sizes[index]
        # Backwards, so that the blocks with the lowest offsets are the first to be used.
        last = start + (_SLAB // size - 1) * size
        self._free_blocks[index].extend(range(last, start - 1, -size))

    def _take_pages(self, size: int, alignment: int) -> int:
        offset = _take(self._freed_pages, size, alignment)
        if offset >= 0:
            self.unused -= size
            return offset
        offset = _take(self._new_pages, size, alignment)
        if offset < 0:
            # Only when all free pages are of one kind do those become one piece that lie side by side.
            self.trim()
            offset = _take(self._new_pages, size, alignment)
        if offset < 0:
            raise Overloaded(
                f"the memory for requests to the engine is full: {self.size - self.used} of {self.size} bytes"
                f" are free, and no {size} bytes in one piece; try again later"
            )
        return offset

    def _free_pages(self, offset: int, size: int) -> None:
        _put(self._freed_pages, offset, size)
        self.unused += size
        if self.unused > _MOST_UNUSED:
            if self.unused > self._most:
                self._give_back(self.unused - self._most)
            if not self._ages:
                self._plan(_AGE_S)

    def _give_back(self, nbytes: int) -> int:
        """Give `nbytes` bytes of freed pages back, in whole pages, or all; returns how many were given."""
        freed = self._freed_pages
        given = 0
        # From the end, because the first run that has room is used first.
        while given < nbytes and freed:
            offset, size = freed.pop()
            part = min(size, -(-(nbytes - given) // _PAGE) * _PAGE)
            if part < size:
                freed.append((offset, size - part))
            start = offset + size - part
            self.map.madvise(_MADV_REMOVE, start, part)
            _put(self._new_pages, start, part)
            given += part
        self.unused -= given
        return given

    def _reclaim_slabs(self) -> None:
        """Make free pages of the slabs that have no allocated block."""
        unused = {
            slab for slab, index in enumerate(self._slab_class) if index >= 0 and not self._slab_blocks[slab]
        }
        if not unused:
            return
        for index in {self._slab_class[slab] for slab in unused}:
            kept = [offset for offset in self._free_blocks[index] if offset // _SLAB not in unused]
            self._free_blocks[index][:] = kept
        for slab in unused:
            self._slab_class[slab] = -1
            self._free_pages(slab * _SLAB, _SLAB)


def _take(free: list[tuple[int, int]], size: int, alignment: int) -> int:
    """Take `size` bytes from the first run of pages with room; returns their offset, or -1 if none has."""
    for position in range(len(free)):
        start, length = free[position]
        offset = -(-start // alignment) * alignment
        left = start + length - offset - size
        if left < 0:
            continue
        parts: list[tuple[int, int]] = []
        if offset > start:
            parts.append((start, offset - start))
        if left:
            parts.append((offset + size, left))
        free[position : position + 1] = parts
        return offset
    return -1


def _put(free: list[tuple[int, int]], offset: int, size: int) -> None:
    """Add a run of pages to a sorted list, as one with those that it touches."""
    position = bisect_left(free, (offset, 0))
    if position < len(free) and free[position][0] == offset + size:
        size += free.pop(position)[1]
    if position and free[position - 1][0] + free[position - 1][1] == offset:
        before = free[position - 1]
        free[position - 1] = (before[0], before[1] + size)
    else:
        free.insert(position, (offset, size))


def _small_sizes() -> list[int]:
    """The sizes of small blocks: four for each power of two, so that little of a block stays unused."""
    sizes = [128, 192]
    power = 256
    while power < _LARGEST_SMALL:
        sizes += [power, power * 5 // 4, power * 3 // 2, power * 7 // 4]
        power *= 2
    return [*sizes, _LARGEST_SMALL]
