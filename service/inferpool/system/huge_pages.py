"""Huge pages for the weights of models.

The kernel gives memory in pages of 4 KiB, and a model of 200 MB has 50,000 of them. Its unload gives each of
them back. ONNX Runtime holds the interpreter's lock meanwhile, so requests wait. There are 512 times fewer
pages of 2 MiB. Runs become faster as well, because the processor looks up fewer addresses.

So the kernel is asked to copy what a load has mapped into huge pages (MADV_COLLAPSE). There is another way:
glibc asks for huge pages before they are used if `GLIBC_TUNABLES` has `glibc.malloc.hugetlb=1`. That saves
page faults, but the process has to start again, and glibc asks for the heap as well. A huge page in the heap
costs memory: the kernel keeps all of it until memory is short, even if most of it was given back.

Sources: madvise(2), mincore(2); the kernel's document transhuge.rst.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.system.cgroups import ROOT

_KERNEL: Final = "sys/kernel/mm/transparent_hugepage"
_MADV_COLLAPSE: Final = 25
_PAGES_A_CALL: Final = 8
"""Huge pages that one call makes; between two calls this thread takes the interpreter's lock."""
_MOST_FAILURES: Final = 4
"""After more calls that have failed, the kernel is not asked again. It may be too old, or refuse."""
_LEAST_FREE: Final = 4 * _PAGES_A_CALL
"""With fewer free huge pages, the kernel might have to make some."""
_ANONYMOUS: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 *$", re.MULTILINE)
"""Private memory without a file or a name, so not the heap and not the main thread's stack."""


class Extent(NamedTuple):
    """Addresses from `start` on, up to and without `end`."""

    start: int
    end: int


def anonymous_mappings() -> list[Extent]:
    """The anonymous mappings of this process by address; none if the kernel does not say."""
    try:
        found = _ANONYMOUS.findall(Path("/proc/self/maps").read_bytes())
    except OSError:
        return []
    return [Extent(int(start, 16), int(end, 16)) for start, end in found]


def collapse_since(before: Sequence[Extent], root: Path = ROOT) -> int:
    """Copy what was mapped after `before` into huge pages; returns for how many bytes the kernel did so.

    `before` is what `anonymous_mappings` has returned. A huge page replaces only pages that are all in
    memory, so the process does not grow. A thread that uses one of them meanwhile waits for a moment. Nothing
    happens if the kernel's mode is `never`, if the kernel is older than 6.1, or if it has no huge page free.
    `root` contains `proc` and `sys`.
    """
    size = _huge_page_bytes(root / _KERNEL)
    if not size:
        return 0
    collapsed = failures = 0
    for mapped in new_parts(anonymous_mappings(), before):
        for extent in _resident(mapped, size):
            for part in _cut(extent, _PAGES_A_CALL * size):
                # Otherwise the kernel would move pages of this process to make room. A thread of low priority
                # may lose its core meanwhile, and then all threads that need these pages wait.
                if free_pages(size, root) < _LEAST_FREE or failures > _MOST_FAILURES:
                    return collapsed
                if _collapse(part):
                    collapsed += part.end - part.start
                else:
                    failures += 1
    return collapsed


def free_pages(size: int, root: Path = ROOT) -> int:
    """How many pages of `size` bytes the kernel has free, on the node of the machine that has the fewest.

    Source: proc_pid_buddyinfo(5): free blocks of 1, 2, 4 and so on pages, for each zone of each node.
    """
    nodes: dict[str, int] = {}
    first = (size // mmap.PAGESIZE).bit_length() - 1
    try:
        for line in (root / "proc/buddyinfo").read_text().splitlines():
            node, _, rest = line.partition(",")
            blocks = rest.split()[2 + first :]
            nodes[node] = nodes.get(node, 0) + sum(int(count) << power for power, count in enumerate(blocks))
    except (OSError, ValueError):
        return 0
    return min(nodes.values(), default=0)


def new_parts(now: Sequence[Extent], before: Sequence[Extent]) -> Iterator[Extent]:
    """The parts of `now` that are not in `before`; both are sorted by address.

    The kernel merges mappings that are side by side, so a mapping may be new in part.
    """
    first = 0
    for start, end in now:
        while first < len(before) and before[first].end <= start:
            first += 1
        at = first
        while at < len(before) and before[at].start < end:
            if start < before[at].start:
                yield Extent(start, before[at].start)
            start = max(start, before[at].end)
            at += 1
        if start < end:
            yield Extent(start, end)


def _huge_page_bytes(kernel: Path) -> int:
    """The size of a huge page; 0 if the kernel gives none."""
    try:
        if "[never]" in (kernel / "enabled").read_text():
            return 0
        return int((kernel / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _cut(extent: Extent, size: int) -> Iterator[Extent]:
    for start in range(extent.start, extent.end, size):
        yield Extent(start, min(start + size, extent.end))


def _collapse(extent: Extent) -> bool:
    """Copy pages into huge pages, without the interpreter's lock; False if the kernel has left some out.

    It leaves out pages that are in use at the moment (EAGAIN).
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(madvise(extent.start, extent.end - extent.start, _MADV_COLLAPSE) == 0)


def _resident(mapped: Extent, size: int) -> Iterator[Extent]:
    """The parts of a mapping that consist of whole huge pages' worth of pages that are all in memory."""
    start, end = -(-mapped.start // size) * size, mapped.end // size * size
    if start >= end:
        return
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    states = ctypes.create_string_buffer((end - start) // mmap.PAGESIZE)
    if mincore(start, end - start, states) != 0:  # it was unmapped meanwhile
        return
    present, pages = states.raw, size // mmap.PAGESIZE
    first = None
    for address in range(start, end, size):
        page = (address - start) // mmap.PAGESIZE
        if present.find(b"\0", page, page + pages) < 0:
            first = address if first is None else first
        elif first is not None:
            yield Extent(first, address)
            first = None
    if first is not None:
        yield Extent(first, end)
