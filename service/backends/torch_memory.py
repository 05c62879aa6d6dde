"""Memory for PyTorch on the CPU: kept for the next run instead of given back after each.

PyTorch allocates what it needs in a run anew each time. glibc gives freed blocks of some size back to the
kernel, which fills them with zeros page by page in the next run: a third of the time of a small
convolutional network at some batch sizes (`benchmarks/torch_backends.py`).
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Options of mallopt(3), from malloc.h."""

_BLOCK_BYTES: Final = 32 * 1024 * 1024
"""Smaller blocks come from memory that is kept; glibc allows no more than this."""

_KEPT_BYTES: Final = 256 * 1024 * 1024
"""Free memory at the end of an arena that is kept."""


def keep_memory() -> None:
    """Let the process keep freed memory, unless its environment says how (MALLOC_…) or there is no glibc."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
