"""Imports without garbage collections, which take a sixth of the time of the imports."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Let the garbage collector rest within the block: what modules make stays for good.

    Python would traverse all of them again and again while their number grows.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
