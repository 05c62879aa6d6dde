"""Shared memory for the tensors of requests: an arena of blocks, mapped by a web process and an engine.

The web process allocates and frees every block. The engine only reads inputs from a block, and writes outputs
into the part of the block that is kept for them. The memory is a memfd: it has no name, so nothing is left
behind when processes die, and its pages count in the memory of the container.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import bisect_left
from typing import Final

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
"""So many bytes of freed pages stay in memory, because writing to new pages is slow."""
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

    Blocks up to 64 KiB come from lists of free blocks by size. Larger blocks are runs of pages; their memory
    goes back to the system after they are freed.

    Attributes:
        size: bytes of the arena.
        map: the mapped memory.
        memory: the same memory, for single bytes.
        used: bytes of all blocks that are allocated.
    """

    __slots__ = (
        "_class_of", "_free_blocks", "_free_pages", "_freed", "_sizes", "_slab_blocks", "_slab_class", "map",
        "memory", "size", "used",
    )  # fmt: skip

    def __init__(self, descriptor: int) -> None:
        """Map the arena of `descriptor`, which may be closed afterwards. Raises OSError or ValueError."""
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
        # The runs of free pages by offset, sorted: [offset, bytes]. No two of them touch.
        self._free_pages: list[tuple[int, int]] = [(0, self.size)] if self.size else []
        self._freed = 0

    def allocate(self, nbytes: int) -> int:
        """Return the offset of a new block of at least `nbytes` bytes; raises Overloaded if none fits."""
        if nbytes > _LARGEST_SMALL:
            size = -(-nbytes // _PAGE) * _PAGE
            offset = self._take_pages(size, _PAGE)
            self.used += size
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
            self._give_pages(offset, size)
            return
        index = self._class_of[(nbytes + (ALIGNMENT - 1)) // ALIGNMENT]
        self._free_blocks[index].append(offset)
        self._slab_blocks[offset // _SLAB] -= 1
        self.used -= self._sizes[index]

    def trim(self) -> None:
        """Give the memory of everything that is free back to the system."""
        self._reclaim_slabs()
        self._punch_out()

    def _cut_slab(self, index: int) -> None:
        start = self._take_pages(_SLAB, _SLAB)
        self._slab_class[start // _SLAB] = index
        size = self._sizes[index]
        # Backwards, so that the blocks with the lowest offsets are the first to be used.
        last = start + (_SLAB // size - 1) * size
        self._free_blocks[index].extend(range(last, start - 1, -size))

    def _take_pages(self, size: int, alignment: int) -> int:
        offset = self._find_pages(size, alignment)
        if offset < 0:
            self._reclaim_slabs()
            offset = self._find_pages(size, alignment)
        if offset < 0:
            raise Overloaded(
                f"the memory for requests to the engine is full: {self.size - self.used} of {self.size} bytes"
                f" are free, and no {size} bytes in one piece; try again later"
            )
        return offset

    def _find_pages(self, size: int, alignment: int) -> int:
        """Take pages from the first run of free pages that has room; -1 if none has."""
        free = self._free_pages
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

    def _give_pages(self, offset: int, size: int) -> None:
        free = self._free_pages
        self._freed += size
        position = bisect_left(free, (offset, 0))
        if position < len(free) and free[position][0] == offset + size:
            size += free.pop(position)[1]
        if position and free[position - 1][0] + free[position - 1][1] == offset:
            before = free[position - 1]
            free[position - 1] = (before[0], before[1] + size)
        else:
            free.insert(position, (offset, size))
        if self._freed > _MOST_UNUSED:
            self._punch_out()

    def _punch_out(self) -> None:
        self._freed = 0
        for offset, size in self._free_pages:
            self.map.madvise(_MADV_REMOVE, offset, size)

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
            self._give_pages(slab * _SLAB, _SLAB)


def _small_sizes() -> list[int]:
    """The sizes of small blocks: four for each power of two, so that little of a block stays unused."""
    sizes = [128, 192]
    power = 256
    while power < _LARGEST_SMALL:
        sizes += [power, power * 5 // 4, power * 3 // 2, power * 7 // 4]
        power *= 2
    return [*sizes, _LARGEST_SMALL]
