"""Prepares the process before PyTorch is imported. Variables that the user has set keep their values."""

from __future__ import annotations

import os
from typing import Final

from inferpool.system.memory import keep_freed_memory

_ENVIRONMENT: Final = {
    # By default a thread that waits for the other threads of a run spins, and takes the core that they need.
    # With the web side beside it, runs of two threads took ten times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Compiled code reads beyond inputs that are smaller than it was compiled for, unless this is set.
    "AOTI_RUNTIME_CHECK_INPUTS": "1",
}

_KEPT_BYTES: Final = 256 * 2**20
"""PyTorch allocates the memory of every run anew, so more is kept than the server keeps by default."""


def prepare() -> None:
    """Set the variables that PyTorch and its libraries read once, and keep freed memory.

    Without the latter, glibc returns freed blocks of some sizes to the kernel, which clears them page by page
    in the next run. That is up to half the time of a small convolutional network at some batch sizes.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keep_freed_memory(_KEPT_BYTES)
