"""What this machine's kernel has of huge pages."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable
from pathlib import Path

from inferpool.system.huge_pages import free_pages

_KERNEL = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25
_LEAST_FREE = 128
"""Others may take some between this look and that of the server."""


def missing() -> str:
    """Say why a process gets no huge pages for its model at the moment, or return an empty text."""
    try:
        mode = (_KERNEL / "enabled").read_text()
        size = int((_KERNEL / "hpage_pmd_size").read_text())
    except OSError:
        return "the kernel has no huge pages"
    if "[never]" in mode:
        return "the kernel gives no huge pages: its mode is never"
    if (free := free_pages(size)) < _LEAST_FREE:
        return f"the kernel has {free} free huge pages, on the node with the fewest"
    with mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"1" * len(memory))
        try:
            memory.madvise(_MADV_COLLAPSE)
        except OSError as error:
            return f"the kernel makes no huge page: {error.strerror}"
    return ""


def held_bytes(pids: Iterable[int]) -> int:
    """How many bytes of these processes are in huge pages."""
    texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return 1024 * sum(int(kib) for text in texts for kib in re.findall(r"^AnonHugePages: +(\d+)", text, re.M))
