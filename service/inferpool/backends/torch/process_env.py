"""What the process has to be like before PyTorch is imported into it; the environment's own word counts."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_ENVIRONMENT: Final = {
    # Threads that wait for the others of a run would spin, which takes the core from those that they wait for
    # wherever all cores are busy: with the web side beside it, runs of two threads took ten times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Compiled code reads beyond its inputs where they are smaller than it was compiled for, unless it checks.
    "AOTI_RUNTIME_CHECK_INPUTS": "1",
}

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Options of mallopt(3), from malloc.h."""

_BLOCK_BYTES: Final = 32 * 1024 * 1024
"""Smaller blocks come from memory that is kept; glibc allows no more than this."""

_KEPT_BYTES: Final = 256 * 1024 * 1024
"""Free memory at the end of an arena that is kept."""


def prepare() -> None:
    """Set the environment that PyTorch and what it brings read once, and how memory is kept."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not any(name.startswith("MALLOC_") for name in os.environ):
        _keep_memory()


def _keep_memory() -> None:
    """Let the process keep freed memory, where it runs on glibc.

    PyTorch allocates what it needs in a run anew each time. glibc gives freed blocks of some sizes back to
    the kernel, which has to clear them page by page in the next run: up to half the time of a small
    convolutional network at some batch sizes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
